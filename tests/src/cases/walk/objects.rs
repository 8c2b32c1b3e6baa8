//! A cluster that changes at random: which objects there are, and what they
//! say. What it means for a node is none of its business.
//!
//! Of two Services with one address one loses, and a plan says nothing about
//! the loser's endpoints; so those of rivals run on no node that we look at.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use serde_json::{Value, json};

use crate::random::Random;

/// Services at most; with their slices about five times as many objects.
const SERVICES: usize = 24;

/// The last of them share VIPs and node ports with the first.
const RIVALS: usize = 4;

/// Other nodes at most.
const NODES: usize = 6;

/// Files that the objects are in.
const FILES: usize = 4;

/// In a hundred changes of an object that exists, so many delete it; with that
/// about three in four objects exist at any time.
const DELETED: usize = 30;

/// This node's addresses, on links of which the other nodes are too.
const OWN: [&str; 2] = ["192.0.2.1", "2001:db8::1"];

/// An object, by kind and number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Key {
    Service(usize),
    /// Of a Service; IPv6 or not; the first or the second of the family.
    Slice(usize, bool, bool),
    /// 0 is the node itself.
    Node(usize),
}

/// The objects that there are, each with the file it is in.
#[derive(Debug)]
pub(in crate::cases) struct Cluster {
    objects: BTreeMap<Key, (usize, Value)>,
    /// The number of the last batch, which the markers show.
    batch: u16,
}

/// How many objects there are, markers included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Counts {
    pub(super) services: usize,
    pub(super) slices: usize,
    pub(super) nodes: usize,
}

impl Cluster {
    /// Nothing but the node.
    pub(in crate::cases) fn new() -> Self {
        let node = (0, node(0, &mut Random::new(0)));
        Self {
            objects: BTreeMap::from([(Key::Node(0), node)]),
            batch: 0,
        }
    }

    /// Changes so many objects at the most, each once: they come, go, say
    /// something else or move to another file. Returns how many it were.
    pub(in crate::cases) fn change(&mut self, wanted: usize, random: &mut Random) -> usize {
        let mut keys = keys();
        let mut changed = BTreeSet::new();
        while changed.len() < wanted && !keys.is_empty() {
            let key = keys.swap_remove(random.below(keys.len()));
            if self.change_one(key, random) {
                changed.insert(key);
            }
        }
        changed.len()
    }

    /// Whether it is another object now, or none.
    fn change_one(&mut self, key: Key, random: &mut Random) -> bool {
        let exists = self.objects.contains_key(&key);
        if exists && key != Key::Node(0) && random.chance(DELETED) {
            self.objects.remove(&key);
            return true;
        }
        let new = (random.below(FILES), object(key, random));
        let old = self.objects.insert(key, new.clone());
        // Another file alone changes nothing for the node, but is a way to go wrong.
        old.as_ref() != Some(&new)
    }

    /// Takes everything away but the node.
    pub(super) fn clear(&mut self) -> usize {
        let before = self.objects.len();
        self.objects.retain(|key, _| *key == Key::Node(0));
        before - self.objects.len()
    }

    /// Every object that there can be, as one seed wants them.
    pub(in crate::cases) fn fill(&mut self, seed: u64) -> usize {
        let mut random = Random::new(seed);
        for key in keys() {
            let object = object(key, &mut random);
            self.objects.insert(key, (random.below(FILES), object));
        }
        self.objects.len()
    }

    /// How many objects the agent should know.
    pub(super) fn counts(&self) -> Counts {
        let mut counts = Counts {
            services: FILES,
            slices: FILES,
            nodes: 0,
        };
        for key in self.objects.keys() {
            match key {
                Key::Service(_) => counts.services += 1,
                Key::Slice(..) => counts.slices += 1,
                Key::Node(_) => counts.nodes += 1,
            }
        }
        counts
    }

    /// The files as they are now, each with a marker that was never there
    /// before: a Service that [`Self::marks`] shows in the kernel.
    pub(super) fn files(&mut self) -> Vec<String> {
        self.batch += 1;
        let marker = |file| {
            let [service, slice] = self.marker(file);
            format!("{service}\n---\n{slice}\n")
        };
        let mut files: Vec<String> = (0..FILES).map(marker).collect();
        for (file, object) in self.objects.values() {
            // Writing to a String cannot fail. JSON is YAML.
            let _ = write!(files[*file], "---\n{object}\n");
        }
        files
    }

    /// The objects as they are now, markers among them, whatever file they are in.
    pub(in crate::cases) fn values(&mut self) -> Vec<Value> {
        self.batch += 1;
        let markers = (0..FILES).flat_map(|file| self.marker(file));
        let objects = self.objects.values().map(|(_, object)| object.clone());
        markers.chain(objects).collect()
    }

    /// The Node objects.
    pub(super) fn nodes(&self) -> Vec<Value> {
        let nodes = self.objects.range(Key::Node(0)..);
        nodes.map(|(_, (_, object))| object.clone()).collect()
    }

    /// The frontends of the markers, as `ADDRESS:PORT/TCP`.
    pub(super) fn marks(&self) -> Vec<String> {
        let mark = |file| format!("{}:{}/TCP", marker_vip(file), self.marker_port());
        (0..FILES).map(mark).collect()
    }

    fn marker_port(&self) -> u16 {
        10_000 + self.batch % 20_000
    }

    fn marker(&self, file: usize) -> [Value; 2] {
        let name = format!("marker-{file}");
        let service = json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
            "spec": {"clusterIP": marker_vip(file), "ports": [{"port": self.marker_port()}]},
        });
        let slice = json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {"name": name, "labels": {"kubernetes.io/service-name": name}},
            "addressType": "IPv4", "ports": [{"port": 8080}],
            "endpoints": [{"addresses": ["10.244.200.1"]}],
        });
        [service, slice]
    }
}

fn marker_vip(file: usize) -> String {
    format!("10.96.255.{}", file + 1)
}

/// Every object that there can be.
fn keys() -> Vec<Key> {
    let slices = |service| {
        let of = move |v6| {
            [
                Key::Slice(service, v6, false),
                Key::Slice(service, v6, true),
            ]
        };
        [false, true].into_iter().flat_map(of)
    };
    let services = (0..SERVICES).flat_map(|service| {
        let service_itself = std::iter::once(Key::Service(service));
        service_itself.chain(slices(service))
    });
    services.chain((0..=NODES).map(Key::Node)).collect()
}

fn object(key: Key, random: &mut Random) -> Value {
    match key {
        Key::Service(number) => service(number, random),
        Key::Slice(number, v6, second) => slice(number, v6, second, random),
        Key::Node(number) => node(number, random),
    }
}

/// Who competes for an address: the VIP and node ports are those of this number.
fn claim(service: usize) -> usize {
    if service >= SERVICES - RIVALS {
        service - (SERVICES - RIVALS)
    } else {
        service
    }
}

fn is_rival(service: usize) -> bool {
    service < RIVALS || claim(service) != service
}

fn service(number: usize, random: &mut Random) -> Value {
    let claim = claim(number);
    let vips = [
        format!("10.96.1.{claim}"),
        format!("fd00:10:96::1:{claim:x}"),
    ];
    // The second VIP of a few is shared by all of them, with other ports.
    let families = random.below(10);
    let vips: Vec<&String> = match families {
        0..=2 => vec![&vips[0]],
        3..=4 => vec![&vips[1]],
        _ => vips.iter().collect(),
    };
    let node_ports = random.chance(30);
    let mut ports = Vec::new();
    for (index, name) in ["a", "b", "c"].into_iter().enumerate() {
        if index > 0 && random.chance(60) {
            continue;
        }
        let protocol = *random.pick(&["TCP", "TCP", "UDP"]);
        let mut port = json!({
            "name": name, "protocol": protocol, "port": 80 + index * 10 + random.below(2),
        });
        if node_ports {
            port["nodePort"] = json!(30_000 + claim * 6 + index * 2 + random.below(2));
        }
        ports.push(port);
    }
    let mut metadata = json!({"name": format!("s{number}"), "namespace": "walk"});
    if random.chance(70) {
        // Of two with one address the older one holds it.
        let second = random.below(60);
        metadata["creationTimestamp"] = json!(format!("2026-01-01T00:00:{second:02}Z"));
    }
    if random.chance(4) {
        metadata["labels"] = json!({"service.kubernetes.io/service-proxy-name": "other"});
    }
    let cluster_ips = if random.chance(4) {
        json!(["None"])
    } else {
        json!(vips)
    };
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": metadata,
        "spec": {
            "type": if node_ports { "NodePort" } else { "ClusterIP" },
            "clusterIP": cluster_ips[0], "clusterIPs": cluster_ips, "ports": ports,
        },
    })
}

/// Both slices of a family draw from the same endpoints.
fn slice(number: usize, v6: bool, second: bool, random: &mut Random) -> Value {
    let (family, prefix) = if v6 {
        ("IPv6", "fd00:10:244:")
    } else {
        ("IPv4", "10.244.")
    };
    let mut endpoints = Vec::new();
    for _ in 0..random.below(7) {
        // This node, another one, or beyond the cluster.
        let node = if is_rival(number) {
            2 + random.below(4)
        } else {
            1 + random.below(5)
        };
        let host = 1 + (number * 3 + random.below(6)) % 250;
        let address = if v6 {
            format!("{prefix}{node}::{host:x}")
        } else {
            format!("{prefix}{node}.{host}")
        };
        let conditions = match random.below(8) {
            0 => json!({"ready": false, "serving": true, "terminating": true}),
            1 => json!({"ready": false, "serving": false, "terminating": true}),
            2 => json!({"ready": false}),
            3 => json!({}),
            _ => json!({"ready": true}),
        };
        let mut endpoint = json!({"addresses": [address], "conditions": conditions});
        if random.chance(80) {
            endpoint["nodeName"] = json!(node_name(node - 1));
        }
        endpoints.push(endpoint);
    }
    let ports: Vec<Value> = ["a", "b", "c"]
        .into_iter()
        .flat_map(|name| ["TCP", "UDP"].map(|protocol| (name, protocol)))
        .filter_map(|(name, protocol)| {
            let port = 8080 + random.below(2);
            let known = random.chance(90);
            known.then(|| json!({"name": name, "protocol": protocol, "port": port}))
        })
        .collect();
    // A slice may go from one Service to another.
    let service = if random.chance(5) && !is_rival(number) {
        RIVALS + random.below(SERVICES - 2 * RIVALS)
    } else {
        number
    };
    let (family_digit, part) = (if v6 { 6 } else { 4 }, u8::from(second));
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "name": format!("s{number}-{family_digit}-{part}"), "namespace": "walk",
            "labels": {"kubernetes.io/service-name": format!("s{service}")},
        },
        "addressType": family, "ports": ports, "endpoints": endpoints,
    })
}

fn node_name(number: usize) -> String {
    format!("node-{}", char::from(b"abcdefghi"[number % 9]))
}

fn node(number: usize, random: &mut Random) -> Value {
    let ranges = [
        format!("10.244.{}.0/24", number + 1),
        format!("fd00:10:244:{:x}::/64", number + 1),
    ];
    let ranges = match random.below(6) {
        0 => &ranges[..1],
        1 => &ranges[1..],
        _ => &ranges[..],
    };
    let addresses = if number == 0 {
        OWN.map(str::to_owned)
    } else {
        // Another address is another gateway.
        let host = 10 + number * 4 + random.below(3);
        [format!("192.0.2.{host}"), format!("2001:db8::{host:x}")]
    };
    let addresses = addresses.map(|ip| json!({"type": "InternalIP", "address": ip}));
    json!({
        "apiVersion": "v1", "kind": "Node", "metadata": {"name": node_name(number)},
        "spec": {"podCIDRs": ranges}, "status": {"addresses": addresses},
    })
}
