//! The table of the tests, and the program `nft`.

use std::path::Path;
use std::process::Command;

use ferrule_datapath::filter::{TableState, table};
use ferrule_netlink::{Protocol, Socket};

/// Its name.
pub(crate) const TABLE: &str = "guard-test";

pub(crate) fn program() -> &'static Path {
    Path::new("nft")
}

pub(crate) fn nft(arguments: &[&str]) -> String {
    let output = Command::new("nft").args(arguments).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

pub(crate) async fn state() -> Option<TableState> {
    let socket = Socket::open(Protocol::Netfilter).unwrap();
    table(&socket, TABLE).await.unwrap()
}
