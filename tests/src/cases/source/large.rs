//! A large cluster: how long the agent takes to know it, and what memory.
//! `FERRULE_API_SERVICES` says how large; `make test-full` takes 50,000.

use std::time::{Duration, Instant};

use anyhow::ensure;
use ferrule_api_server::{ApiServer, Authority, Streaming, Validity};
use serde_json::{Value, json};

use super::super::audit::status;
use super::super::soak::say;
use crate::api::{self, ADDRESS, Api, kubeconfig};
use crate::context::Context;
use crate::node::{Node, POD_RANGES, manifest};
use crate::random;
use crate::wait;

const SERVICES: &str = "FERRULE_API_SERVICES";

/// Services unless told otherwise, each with a slice of three endpoints.
const USUAL: u64 = 1000;

/// Memory that the agent may have at most, in KiB: for itself, and for each
/// Service with its slice.
const MEMORY: (u64, u64) = (100 * 1024, 24);

fn count() -> u64 {
    let count = random::from_environment(SERVICES);
    count.ok().flatten().unwrap_or(USUAL)
}

/// Longest that it may take, in minutes.
pub(in crate::cases) fn minutes() -> u64 {
    10 + count() / 1000
}

/// Pages and streams alike are read in bounded memory, and what changes later is
/// known at once.
pub(in crate::cases) fn a_large_cluster(context: &mut Context) -> anyhow::Result<()> {
    let node = Node::create(context, "node-a")?;
    let authority = Authority::new("cluster")?;
    let identity = authority.signs(&["127.0.0.1"], Validity::Now)?;
    let url = format!("https://{ADDRESS}");
    node.follow(
        &kubeconfig(&url, ", certificate-authority: ca.crt"),
        &authority.certificate(),
    )?;
    for streaming in [Streaming::Served, Streaming::Refused] {
        let server = ApiServer::new(streaming);
        api::put_all(&server, &manifest("node-a", &POD_RANGES, &[]))?;
        for number in 0..count() {
            server.put(service(number))?;
            server.put(slice(number))?;
        }
        let acceptor = identity.acceptor(None)?;
        let _running = Api::start_at(node.netns(), &server, ADDRESS, acceptor)?;
        let start = Instant::now();
        node.start()?;
        knows(context, &node, count())?;
        let took = start.elapsed();
        let usage = node.usage()?;
        server.put(service(count()))?;
        let start = Instant::now();
        knows(context, &node, count() + 1)?;
        let later = start.elapsed();
        say(&format!(
            "{} Services, {streaming:?}: {took:.1?}, of them {:.1?} of a processor, and {} KiB at \
             most, {} KiB then; one more: {later:.1?}; pages of {} at most",
            count(),
            usage.cpu,
            usage.peak,
            usage.resident,
            server.largest_page()
        ))?;
        ensure!(server.largest_page() <= 500, "a page without a limit");
        let most = MEMORY.0 + count() * MEMORY.1;
        ensure!(usage.peak <= most, "more than {most} KiB");
        the_loser_is_told(&server)?;
        node.stop()?;
    }
    Ok(())
}

/// A Service that claims another's address has an Event that says so.
fn the_loser_is_told(server: &ApiServer) -> anyhow::Result<()> {
    let mut late = service(0);
    late["metadata"]["name"] = "late".into();
    late["metadata"]["uid"] = "of-late".into();
    late["metadata"]["creationTimestamp"] = "2026-02-01T00:00:00Z".into();
    server.put(late)?;
    wait::until_ok("an Event", wait::SETTLED, || {
        let events = server.events();
        let told = events.iter().any(|event| {
            event["involvedObject"]["uid"] == "of-late" && event["reason"] == "AddressConflict"
        });
        ensure!(told, "{events:#?}");
        Ok(())
    })
}

/// Waits until the agent knows of so many Services and of every slice.
fn knows(context: &Context, node: &Node, services: u64) -> anyhow::Result<()> {
    let limit = Duration::from_mins(minutes());
    wait::until_ok("everything is known", limit, || {
        node.check_alive()?;
        let told = status(context, node)?;
        let source = &told["source"];
        let known = source["services"] == services && source["endpointSlices"] == count();
        ensure!(known && source["complete"] == true, "{source:#}");
        Ok(())
    })
}

fn service(number: u64) -> Value {
    json!({
        "kind": "Service", "apiVersion": "v1",
        "metadata": {
            "name": format!("s{number}"), "namespace": "shop", "uid": format!("{number:032x}"),
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": {"app.kubernetes.io/name": format!("s{number}")},
            "managedFields": [{"manager": "kubectl", "operation": "Update", "fieldsV1": {
                "f:spec": {"f:internalTrafficPolicy": {}, "f:ports": {}, "f:selector": {}},
            }}],
        },
        "spec": {
            "clusterIP": vip(number), "clusterIPs": [vip(number)], "ipFamilies": ["IPv4"],
            "type": "ClusterIP", "selector": {"app": format!("s{number}")},
            "ports": [{"name": "http", "port": 80, "protocol": "TCP", "targetPort": 8080}],
        },
    })
}

fn vip(number: u64) -> String {
    format!("10.96.{}.{}", number / 250 + 1, number % 250 + 1)
}

fn slice(number: u64) -> Value {
    let endpoints = (0..3).map(|host| {
        json!({
            "addresses": [format!("10.244.{}.{}", number % 200, host * 80 + number % 80 + 1)],
            "conditions": {"ready": true, "serving": true, "terminating": false},
            "nodeName": format!("node-{}", number % 100),
            "targetRef": {"kind": "Pod", "name": format!("s{number}-{host}"), "namespace": "shop"},
        })
    });
    json!({
        "kind": "EndpointSlice", "apiVersion": "discovery.k8s.io/v1",
        "metadata": {
            "name": format!("s{number}-x"), "namespace": "shop",
            "labels": {"kubernetes.io/service-name": format!("s{number}")},
        },
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
        "endpoints": endpoints.collect::<Vec<Value>>(),
    })
}
