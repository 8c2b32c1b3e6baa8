//! The kernel of the node under test, programmed by the library: what the agent does at
//! its start, without the agent.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, ensure};
use ferrule_datapath::{Node, Settings, Sysctls, apply};
use ferrule_model::diff::diff_all;
use ferrule_model::names::IfName;
use ferrule_model::view::NodeView;

use super::wire::block_on;
use crate::dump::VIP_DEVICE;
use crate::netns::Netns;

/// Our nftables table.
pub(super) const TABLE: &str = "ferrule";

/// Programs what the view wants, and looks that nothing is left to be done.
pub(super) fn program(namespace: &Netns, view: &NodeView) -> anyhow::Result<()> {
    namespace.run(|| {
        block_on(async {
            let mut kernel = open(view).await?;
            let observed = kernel.observe().await?;
            let changes = diff_all(view.desired(), &observed);
            let applied = apply(&mut kernel, &changes).await;
            let failed: Vec<String> = applied
                .failed
                .iter()
                .map(|(change, error)| format!("{change:?}: {error}"))
                .collect();
            ensure!(failed.is_empty(), "{}", failed.join("\n"));
            let left = diff_all(view.desired(), &kernel.observe().await?);
            ensure!(left.is_empty(), "the second pass is not empty: {left:?}");
            Ok(())
        })
    })
}

/// Makes what a file of `ipvsadm -S -n` says: a former agent's virtual services.
pub(super) fn restore(namespace: &Netns, file: &Path) -> anyhow::Result<()> {
    let file = File::open(file).with_context(|| format!("open {}", file.display()))?;
    namespace.run(|| {
        let status = Command::new("ipvsadm").arg("-R").stdin(file).status()?;
        ensure!(status.success(), "ipvsadm -R: {status}");
        Ok(())
    })
}

async fn open(view: &NodeView) -> anyhow::Result<Node> {
    let settings = Settings {
        vip_device: IfName::try_from(VIP_DEVICE.to_owned())?,
        vip_binding: view.policy().vip_binding.clone(),
        nft_table: TABLE.to_owned(),
        sysctls: Sysctls {
            root: PathBuf::from("/proc/sys"),
            record: None,
        },
        load_modules: true,
        connection_table_bits: None,
        nft_program: PathBuf::from("nft"),
        excluded: Vec::new(),
    };
    Node::open(settings, view.source_nat(), false)
        .await
        .context("open the kernel of the node")
}
