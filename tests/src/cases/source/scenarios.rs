//! The scenarios of `plan`, each through manifests and through an API: what the
//! kernel then holds is the same.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use ferrule_api_server::{ApiServer, Key, RESOURCES, Streaming};
use serde_json::Value;

use super::super::audit::status;
use super::super::soak::say;
use super::super::world;
use super::state;
use crate::api::Api;
use crate::context::Context;
use crate::link::batch;
use crate::node::Node;
use crate::random::{self, Random};
use crate::{golden, netns, wait};

/// No API holds two objects of one name.
const NOT_IN_AN_API: [&str; 1] = ["duplicate-object"];

/// Nor what is no JSON or has no name, of which this scenario has some. That is left
/// out of its manifests as well: a file of which a part cannot be read takes nothing
/// away, where an API says itself what is gone.
const HAS_MORE_THAN_AN_API: &str = "invalid-object";

/// Repeats a sample.
const SEED: &str = "FERRULE_SCENARIOS_SEED";

/// How many scenarios a sample has.
const SAMPLE: &str = "FERRULE_SCENARIOS";

/// Scenarios unless told otherwise: each takes some seconds on an emulated machine.
const USUAL: u64 = 4;

/// Addresses that the scenarios' node has.
const ADDRESSES: [&str; 4] = [
    "192.0.2.10/24",
    "203.0.113.10/24",
    "2001:db8::10/64",
    "2001:db8:1::10/64",
];

/// A scenario of `agent/tests/plan`.
struct Scenario {
    name: String,
    config: Option<String>,
    /// Its YAML documents.
    documents: Vec<String>,
    /// Which one it is: the markers show it.
    number: usize,
}

impl Scenario {
    fn read(folder: &Path) -> anyhow::Result<Self> {
        let mut files = Vec::new();
        find(&folder.join("manifests"), &mut files)?;
        files.sort();
        let mut documents = Vec::new();
        for file in files {
            let text = fs::read_to_string(&file)?;
            let parts = format!("\n{text}");
            let parts = parts.split("\n---\n").map(str::trim);
            let parts = parts.filter(|part| !part.is_empty());
            documents.extend(parts.map(str::to_owned));
        }
        let name = folder.file_name().context("a folder has a name")?;
        if name == HAS_MORE_THAN_AN_API {
            documents.retain(|document| {
                items(document).is_ok_and(|items| items.iter().all(|item| key(item).is_some()))
            });
        }
        Ok(Self {
            name: name.to_string_lossy().into_owned(),
            config: fs::read_to_string(folder.join("config.yaml")).ok(),
            documents,
            number: 0,
        })
    }

    /// A Service that shows in the kernel that the scenario was taken in.
    fn marker(&self) -> [String; 2] {
        let service = format!(
            "apiVersion: v1
kind: Service
metadata: {{name: marker, namespace: default}}
spec: {{clusterIP: 10.96.255.1, ports: [{{port: {}}}]}}
",
            1000 + self.number
        );
        let slice = "apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: marker, namespace: default, labels: {kubernetes.io/service-name: marker}}
addressType: IPv4
ports: [{port: 8080}]
endpoints: [{addresses: [10.244.200.1]}]
";
        [service, slice.to_owned()]
    }

    fn all(&self) -> impl Iterator<Item = String> {
        self.documents.iter().cloned().chain(self.marker())
    }

    /// What of it an API holds: objects of the kinds that it serves, which have a name.
    fn objects(&self) -> anyhow::Result<BTreeMap<Key, Value>> {
        let mut objects = BTreeMap::new();
        for document in self.all() {
            let items = items(&document)?.into_iter();
            objects.extend(items.filter_map(|item| Some((key(&item)?, item))));
        }
        Ok(objects)
    }
}

/// The objects of a document: itself, or what it lists.
fn items(document: &str) -> anyhow::Result<Vec<Value>> {
    let object: Value =
        serde_saphyr::from_str(document).map_err(|error| anyhow::anyhow!("{document}\n{error}"))?;
    Ok(match &object["items"] {
        Value::Array(items) => items.clone(),
        _ => vec![object],
    })
}

fn find(folder: &Path, files: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if path.is_dir() {
            find(&path, files)?;
        } else if name.ends_with(".yaml") && !name.starts_with('.') {
            files.push(path);
        }
    }
    Ok(())
}

/// The name by which an API knows an object that it serves.
pub(super) fn key(object: &Value) -> Option<Key> {
    let resource = RESOURCES.into_iter().find(|resource| {
        object["kind"] == resource.kind() && object["apiVersion"] == resource.api_version()
    })?;
    let metadata = &object["metadata"];
    let namespace = metadata["namespace"].as_str();
    let namespace = match resource.kind() {
        "Node" | "ServiceCIDR" => "",
        _ => namespace.unwrap_or("default"),
    };
    Some(Key {
        resource,
        namespace: namespace.to_owned(),
        name: metadata["name"].as_str()?.to_owned(),
    })
}

/// Longest that so many take, in minutes.
pub(in crate::cases) fn minutes() -> u64 {
    let sample = random::from_environment(SAMPLE).ok().flatten();
    10 + sample.unwrap_or(USUAL).min(200)
}

/// So many of them as are asked for, by chance, those with the same configuration side
/// by side.
fn scenarios() -> anyhow::Result<Vec<Scenario>> {
    let seed = random::seed(SEED)?;
    let sample = random::from_environment(SAMPLE)?.unwrap_or(USUAL);
    say(&format!("{SEED}={seed} {SAMPLE}={sample}"))?;
    let mut random = Random::new(seed);
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../agent/tests/plan");
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.join("manifests").is_dir() {
            found.push(Scenario::read(&path).with_context(|| path.display().to_string())?);
        }
    }
    found.retain(|scenario| !NOT_IN_AN_API.contains(&scenario.name.as_str()));
    ensure!(found.len() >= 54, "only {} scenarios", found.len());
    found.sort_by(|a, b| a.name.cmp(&b.name));
    let sample = usize::try_from(sample).unwrap_or(usize::MAX).max(1);
    while found.len() > sample {
        found.swap_remove(random.below(found.len()));
    }
    found.sort_by(|a, b| (&a.config, &a.name).cmp(&(&b.config, &b.name)));
    for (number, scenario) in found.iter_mut().enumerate() {
        scenario.number = number;
    }
    Ok(found)
}

/// Each of a sample of scenarios follows another in a running agent, first as manifests, then
/// again as objects of an API; the kernel does not tell the two apart.
pub(in crate::cases) fn every_scenario_through_both(context: &mut Context) -> anyhow::Result<()> {
    let scenarios = scenarios()?;
    let node = Node::create(context, "node-a")?;
    let _outside = world::outside(context, &node)?;
    let addresses = ADDRESSES.map(|ip| format!("addr add {ip} dev uplink nodad"));
    batch(node.netns(), addresses)?;
    node.remove_manifest("node.yaml")?;

    let mut states = Vec::new();
    through(
        &node,
        &scenarios,
        |scenario| {
            let all: Vec<String> = scenario.all().collect();
            node.write_manifest("all.yaml", &all.join("\n---\n"))
        },
        |scenario| {
            states.push(settled(context, &node, scenario)?);
            Ok(())
        },
    )?;
    let agent = context.binary("ferrule-agent")?;
    let mut cleanup = Command::new(agent);
    node.netns().run(|| netns::check(cleanup.arg("cleanup")))?;

    let server = ApiServer::new(Streaming::Served);
    let _running = Api::start(node.netns(), &server)?;
    node.follow_api()?;
    let mut held = BTreeMap::new();
    let mut compared = 0;
    through(
        &node,
        &scenarios,
        |scenario| {
            let objects = scenario.objects()?;
            put(&server, &mut held, objects)
        },
        |scenario| {
            let before = &states[scenario.number];
            wait::until_ok("the same state", wait::SETTLED, || {
                node.check_alive()?;
                let after = state(&node)?;
                for (before, after) in before.iter().zip(&after) {
                    ensure!(before == after, "{}", golden::difference(before, after));
                }
                Ok(())
            })?;
            // It is not on its way to another one.
            let after = settled(context, &node, scenario)?;
            ensure!(*before == after, "{after:#?}\ninstead of\n{before:#?}");
            compared += before
                .iter()
                .map(|text| text.lines().count())
                .sum::<usize>();
            Ok(())
        },
    )?;
    say(&format!(
        "{} scenarios, {compared} lines of dumps are the same through both",
        scenarios.len()
    ))
}

/// Leads an agent through scenarios; another configuration is another start.
fn through(
    node: &Node,
    scenarios: &[Scenario],
    mut apply: impl FnMut(&Scenario) -> anyhow::Result<()>,
    mut look: impl FnMut(&Scenario) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let mut config = None;
    for scenario in scenarios {
        let begins = config != Some(&scenario.config);
        if begins && config.is_some() {
            node.stop()?;
        }
        apply(scenario)?;
        if begins {
            let text = scenario.config.as_deref();
            node.write_config(text.unwrap_or(NO_CONFIG))?;
            node.start()?;
        }
        config = Some(&scenario.config);
        look(scenario).with_context(|| format!("scenario {}", scenario.name))?;
    }
    node.stop()
}

const NO_CONFIG: &str = "apiVersion: ferrule.io/v1alpha1\nkind: AgentConfiguration\n";

/// Gives a server these objects and no others.
pub(super) fn put(
    server: &Arc<ApiServer>,
    held: &mut BTreeMap<Key, Value>,
    objects: BTreeMap<Key, Value>,
) -> anyhow::Result<()> {
    for key in held.keys().filter(|key| !objects.contains_key(key)) {
        server.delete(key);
    }
    for (key, object) in &objects {
        if held.get(key) != Some(object) {
            server.put(object.clone())?;
        }
    }
    *held = objects;
    Ok(())
}

/// The state when the scenario's marker is there, nothing waits, and two looks
/// show the same.
fn settled(context: &Context, node: &Node, scenario: &Scenario) -> anyhow::Result<[String; 3]> {
    let mark = format!("TCP 10.96.255.1:{} ", 1000 + scenario.number);
    wait::until_ok("the scenario is programmed", wait::SETTLED, || {
        node.check_alive()?;
        let told = status(context, node)?;
        ensure!(told["programmed"]["pending"] == 0, "{told:#}");
        let first = state(node)?;
        ensure!(first[0].contains(&mark), "no {mark:?} in:\n{}", first[0]);
        thread::sleep(Duration::from_millis(200));
        let second = state(node)?;
        ensure!(first == second, "it still changes");
        Ok(second)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_scenario_is_objects_of_an_api() {
        for scenario in scenarios().unwrap() {
            let objects = scenario.objects().unwrap();
            assert!(objects.len() > 2, "{} has only markers", scenario.name);
        }
    }
}
