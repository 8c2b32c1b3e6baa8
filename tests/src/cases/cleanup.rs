//! A node is left as it was found.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::ensure;

use super::world::{self, Backend};
use crate::context::Context;
use crate::dump;
use crate::link::batch;
use crate::netns::Netns;
use crate::node::Node;
use crate::pod::Pod;

/// Settings that the agent has reason to change, by their folders below `/proc/sys/net`.
const SYSCTLS: [(&str, &[&str]); 3] = [
    (
        "ipv4/conf",
        &[
            "forwarding",
            "send_redirects",
            "accept_redirects",
            "arp_ignore",
            "arp_announce",
            "rp_filter",
        ],
    ),
    (
        "ipv6/conf",
        &["forwarding", "accept_ra", "accept_redirects"],
    ),
    ("ipv4", &["vs"]),
];

/// With which the agent changes more than it has to.
const CONFIGURATION: &str = "apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: ipvs
ipvs: {tcpTimeout: 70s, strictARP: true}
conntrack: {maxPerCore: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}
";

/// Everything of a namespace that others could miss, one thing to a line.
fn state(namespace: &Netns) -> anyhow::Result<String> {
    let mut text = dump::ipvs(namespace)?;
    for (program, arguments) in [
        ("ipvsadm", &["-L", "--timeout"][..]),
        ("nft", &["list", "ruleset"][..]),
        ("ip", &["-br", "link"]),
        ("ip", &["-br", "address"]),
        ("ip", &["route", "show", "table", "all"]),
        ("ip", &["-6", "route", "show", "table", "all"]),
    ] {
        writeln!(text, "{program} {arguments:?}")?;
        text.push_str(&namespace.output(program, arguments)?);
    }
    text.push_str(&namespace.run(sysctls)?);
    Ok(text)
}

fn sysctls() -> anyhow::Result<String> {
    let net = Path::new("/proc/sys/net");
    let forward = fs::read_to_string(net.join("ipv4/ip_forward"))?;
    let mut lines = vec![format!("ip_forward {}", forward.trim())];
    for (folder, names) in SYSCTLS {
        for entry in fs::read_dir(net.join(folder))?.flatten() {
            let group = entry.file_name().to_string_lossy().into_owned();
            let whole = names.contains(&group.as_str());
            if !entry.path().is_dir() || !(whole || folder.ends_with("conf")) {
                continue;
            }
            for file in fs::read_dir(entry.path())?.flatten() {
                let name = file.file_name().to_string_lossy().into_owned();
                if let Ok(value) = fs::read_to_string(file.path())
                    && (whole || names.contains(&name.as_str()))
                {
                    lines.push(format!("{folder}/{group}/{name} {}", value.trim()));
                }
            }
        }
    }
    lines.sort();
    Ok(lines.join("\n"))
}

/// Sysctls, nftables, IPVS, links, addresses and routes, also after a start in the middle;
/// what somebody has set since stays.
pub(super) fn a_node_is_left_as_it_was_found(context: &mut Context) -> anyhow::Result<()> {
    let node = Node::create(context, "node-a")?;
    // A host that somebody has hardened: the kernel alters these with forwarding.
    batch(node.netns(), ["link add d0 type dummy"])?;
    node.netns().run(|| {
        for (key, value) in [
            ("ipv4/ip_forward", "0"),
            ("ipv6/conf/all/forwarding", "0"),
            ("ipv4/conf/all/accept_redirects", "0"),
            ("ipv4/conf/d0/forwarding", "1"),
            ("ipv6/conf/d0/forwarding", "1"),
        ] {
            fs::write(Path::new("/proc/sys/net").join(key), value)?;
        }
        Ok(())
    })?;
    node.write_config(CONFIGURATION)?;
    // Modules come with their settings.
    dump::ipvs(node.netns())?;
    let before = state(node.netns())?;
    node.start()?;
    let backend = Backend::create(context, &node, "backend")?;
    let client = Pod::added(context, &node, "client")?;
    node.write_manifest("web.yaml", &world::node_port_service("web", 10, 80, 30_080))?;
    node.write_manifest("slices.yaml", &world::slices("web", &[&backend.pod])?)?;
    world::wait_for_service(client.netns(), 10, 80)?;
    node.kill9()?;
    node.start()?;
    world::wait_for_service(client.netns(), 10, 80)?;
    for pod in [&backend.pod, &client] {
        pod.del(&node)?;
    }
    node.stop()?;
    ensure!(state(node.netns())? != before, "nothing was changed at all");
    let agent = context.binary("ferrule-agent")?;
    let place = node.state();
    let arguments = ["cleanup", "--state-dir", &place.to_string_lossy()];
    node.start()?;
    let refused = node.netns().output(&agent.to_string_lossy(), &arguments);
    ensure!(refused.is_err(), "a node was cleaned up under its agent");
    node.stop()?;
    node.netns().output(&agent.to_string_lossy(), &arguments)?;
    let after = state(node.netns())?;
    let differing: Vec<(&str, &str)> = before
        .lines()
        .zip(after.lines())
        .filter(|(before, after)| before != after)
        .take(20)
        .collect();
    ensure!(before == after, "{differing:#?}\n{after}");
    // Once more is fine, too.
    node.netns().output(&agent.to_string_lossy(), &arguments)?;
    Ok(())
}
