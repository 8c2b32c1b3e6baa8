//! Devices, addresses and routes between namespaces: the network around a node.
//!
//! Set-up goes through one `ip -batch` for each namespace, with the lines that a
//! reader would type.

use std::io::Write as _;
use std::process::{Command, Stdio};

use anyhow::{Context as _, bail};

use crate::netns::Netns;

/// One end of a link: where it is, its name, and its addresses with prefix length.
#[derive(Clone, Copy, Debug)]
pub struct End<'a> {
    /// Where the device lives.
    pub namespace: &'a Netns,
    /// Its name there.
    pub device: &'a str,
    /// Such as `192.0.2.1/24`.
    pub addresses: &'a [&'a str],
}

/// Joins two namespaces by a veth pair that is up and addressed on both sides.
///
/// # Errors
/// When `ip` refuses.
pub fn veth(a: End<'_>, b: End<'_>) -> anyhow::Result<()> {
    let pair = format!(
        "link add name {} type veth peer name {} netns {}",
        a.device,
        b.device,
        b.namespace.path().display()
    );
    batch(a.namespace, std::iter::once(pair).chain(raise(a)))?;
    batch(b.namespace, raise(b))
}

/// Runs lines of `ip` in a namespace, all in one process.
///
/// # Errors
/// When a line fails; those before it took effect.
pub fn batch<L: AsRef<str>>(
    namespace: &Netns,
    lines: impl IntoIterator<Item = L>,
) -> anyhow::Result<()> {
    let mut text = String::new();
    for line in lines {
        text.push_str(line.as_ref());
        text.push('\n');
    }
    namespace.run(|| {
        let mut child = Command::new("ip")
            .args(["-batch", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("start ip")?;
        let written = child
            .stdin
            .take()
            .context("standard input was piped")?
            .write_all(text.as_bytes());
        let output = child.wait_with_output()?;
        if !output.status.success() {
            bail!("ip: {}in\n{text}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(written?)
    })
}

/// Lines that give an end its addresses and switch it on. Addresses of version 6
/// skip duplicate detection, which would hold them back for a second or two.
fn raise(end: End<'_>) -> impl Iterator<Item = String> {
    end.addresses
        .iter()
        .map(move |address| {
            let nodad = if address.contains(':') { " nodad" } else { "" };
            format!("addr add {address} dev {}{nodad}", end.device)
        })
        .chain(std::iter::once(format!("link set dev {} up", end.device)))
}
