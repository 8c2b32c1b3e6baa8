//! The IPVS codec against the kernel: what is set reads back, by our own dump
//! and by `ipvsadm`. The one module that uses a crate of Ferrule's: the codec
//! can say much that the agent never does.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use ferrule_datapath::ipvs::{
    Client, ForwardMethod, Order, RealServer, ServerSettings, Service, ServiceFlags, ServiceKey,
    ServiceSettings, Timeouts, Tunnel,
};
use ferrule_model::address::{BackendAddr, Family, FrontendAddr, Protocol};

use crate::context::Context;
use crate::{dump, golden};

/// Virtual services in the long dump: more than fit into one message of the kernel.
const MANY: u16 = 1500;

pub(super) fn what_is_set_reads_back(context: &mut Context) -> anyhow::Result<()> {
    let namespace = context.netns("codec")?;
    namespace.run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        runtime.block_on(async {
            let client = Client::open().await?;
            services_and_servers(&client).await?;
            refusals(&client).await?;
            timeouts_and_info(&client).await
        })
    })?;
    golden::check("codec.ipvs.txt", &dump::ipvs(&namespace)?)?;
    namespace.run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        runtime.block_on(async {
            let client = Client::open().await?;
            client.flush().await?;
            ensure!(client.services().await?.is_empty(), "flush left services");
            many(&client).await
        })
    })
}

fn address(ip: &str, port: u16, protocol: Protocol) -> anyhow::Result<ServiceKey> {
    Ok(ServiceKey::Address(FrontendAddr::new(
        ip.parse()?,
        port,
        protocol,
    )))
}

fn settings(scheduler: &str, key: &ServiceKey) -> ServiceSettings {
    ServiceSettings {
        scheduler: scheduler.to_owned(),
        flags: ServiceFlags::default(),
        timeout: 0,
        prefix: key.family().bits(),
        engine: None,
    }
}

/// One virtual service of each sort.
fn sorts() -> anyhow::Result<Vec<(ServiceKey, ServiceSettings)>> {
    let plain = address("10.96.0.1", 80, Protocol::Tcp)?;
    let udp = address("10.96.0.1", 53, Protocol::Udp)?;
    let sctp = address("fd00:10:96::1", 9, Protocol::Sctp)?;
    let sticky = address("fd00:10:96::1", 80, Protocol::Tcp)?;
    let marked = |family, mark| ServiceKey::Mark { family, mark };
    let (four, six) = (marked(Family::IPv4, 7), marked(Family::IPv6, 0xffff_ffff));
    Ok(vec![
        (plain, settings("rr", &plain)),
        (
            udp,
            ServiceSettings {
                flags: ServiceFlags::ONE_PACKET,
                ..settings("wlc", &udp)
            },
        ),
        (
            sctp,
            ServiceSettings {
                flags: ServiceFlags::SCHEDULER_1 | ServiceFlags::SCHEDULER_2,
                ..settings("mh", &sctp)
            },
        ),
        (
            sticky,
            ServiceSettings {
                flags: ServiceFlags::PERSISTENT,
                timeout: 10800,
                prefix: 64,
                ..settings("wrr", &sticky)
            },
        ),
        (
            four,
            ServiceSettings {
                flags: ServiceFlags::PERSISTENT,
                timeout: 60,
                prefix: 24,
                ..settings("sh", &four)
            },
        ),
        (six, settings("sed", &six)),
    ])
}

/// Real servers of every sort, in the family.
fn servers(family: Family) -> anyhow::Result<BTreeMap<BackendAddr, ServerSettings>> {
    let ip = |last: u8| match family {
        Family::IPv4 => format!("10.244.1.{last}"),
        Family::IPv6 => format!("fd00:10:244:1::{last}"),
    };
    let limited = ServerSettings {
        weight: 65_535,
        upper: 1000,
        lower: 900,
        ..ServerSettings::default()
    };
    // Direct routing and tunnels cannot map ports, so theirs is the service's or none.
    let tunnel = ServerSettings {
        forward: ForwardMethod::Tunnel,
        weight: 2,
        tunnel: Tunnel {
            kind: 1,
            port: 6080,
            flags: 0,
        },
        ..ServerSettings::default()
    };
    let direct = ServerSettings {
        forward: ForwardMethod::DirectRouting,
        weight: 0,
        ..ServerSettings::default()
    };
    let sorts = [ServerSettings::nat(1), limited, tunnel, direct];
    let mut servers = BTreeMap::new();
    for (last, settings) in (2..).zip(sorts) {
        servers.insert(BackendAddr::new(ip(last).parse()?, 8080), settings);
    }
    Ok(servers)
}

async fn carry_out(client: &Client, orders: &[Order]) -> anyhow::Result<()> {
    for (order, result) in orders.iter().zip(client.carry_out(orders).await) {
        result.with_context(|| format!("{order:?}"))?;
    }
    Ok(())
}

async fn services_and_servers(client: &Client) -> anyhow::Result<()> {
    let wanted = sorts()?;
    let mut orders = Vec::new();
    for (key, settings) in &wanted {
        // First otherwise: what is then set must replace it whole.
        let mut before = settings.clone();
        before.flags = ServiceFlags::SCHEDULER_3;
        before.timeout = 0;
        orders.push(Order::AddService(*key, before));
        for (addr, server) in servers(key.family())? {
            orders.push(Order::AddServer(*key, addr, ServerSettings::nat(9)));
            orders.push(Order::SetServer(*key, addr, server));
        }
        orders.push(Order::SetService(*key, settings.clone()));
        orders.push(Order::Zero(*key));
    }
    carry_out(client, &orders).await?;
    let read = client.services().await?;
    ensure!(read.len() == wanted.len(), "{read:?}");
    for (key, settings) in &wanted {
        let found: Vec<&Service> = read.iter().filter(|service| service.key == *key).collect();
        let [service] = found.as_slice() else {
            anyhow::bail!("{key}: {found:?}");
        };
        let mut got = service.settings.clone();
        ensure!(got.flags.contains(ServiceFlags::HASHED), "{got:?}");
        got.flags = ServiceFlags::from_bits(got.flags.bits() & !ServiceFlags::HASHED.bits());
        ensure!(got == *settings, "{key}: {got:?} instead of {settings:?}");
        let got: BTreeMap<BackendAddr, ServerSettings> = client
            .servers(key)
            .await?
            .into_iter()
            .map(|RealServer { addr, settings, .. }| (addr, settings))
            .collect();
        let wanted = servers(key.family())?;
        ensure!(got == wanted, "{key}: {got:?} instead of {wanted:?}");
    }
    Ok(())
}

async fn refusals(client: &Client) -> anyhow::Result<()> {
    let (known, how) = sorts()?.swap_remove(0);
    let unknown = address("10.96.0.99", 1, Protocol::Tcp)?;
    let server = BackendAddr::new("10.244.1.2".parse()?, 8080);
    let stranger = BackendAddr::new("10.244.1.99".parse()?, 8080);
    let nat = ServerSettings::nat(1);
    let missing = [
        Order::SetService(unknown, how.clone()),
        Order::DeleteService(unknown),
        Order::AddServer(unknown, server, nat),
        Order::SetServer(known, stranger, nat),
        Order::DeleteServer(known, stranger),
        Order::AddService(unknown, settings("nosuch", &unknown)),
    ];
    for (order, result) in missing.iter().zip(client.carry_out(&missing).await) {
        let as_it_should = result
            .as_ref()
            .is_err_and(ferrule_datapath::Error::is_not_found);
        ensure!(as_it_should, "{order:?}: {result:?}");
    }
    let present = [
        Order::AddService(known, how),
        Order::AddServer(known, server, nat),
    ];
    for (order, result) in present.iter().zip(client.carry_out(&present).await) {
        let as_it_should = result
            .as_ref()
            .is_err_and(ferrule_datapath::Error::already_exists);
        ensure!(as_it_should, "{order:?}: {result:?}");
    }
    ensure!(client.servers(&unknown).await?.is_empty());
    Ok(())
}

async fn timeouts_and_info(client: &Client) -> anyhow::Result<()> {
    let before = client.timeouts().await?;
    let kernel = Timeouts {
        tcp: Duration::from_mins(15),
        tcp_fin: Duration::from_mins(2),
        udp: Duration::from_mins(5),
    };
    ensure!(before == kernel, "the kernel's own: {before:?}");
    let change = Timeouts {
        tcp: Duration::from_secs(1000),
        udp: Duration::from_secs(10),
        ..Timeouts::default()
    };
    client.set_timeouts(&change).await?;
    let wanted = Timeouts {
        tcp_fin: before.tcp_fin,
        ..change
    };
    let after = client.timeouts().await?;
    ensure!(after == wanted, "{after:?} instead of {wanted:?}");
    let info = client.info().await?;
    ensure!(info.version.0 == 1 && info.table_size >= 256, "{info:?}");
    Ok(())
}

/// A dump of many messages is whole.
async fn many(client: &Client) -> anyhow::Result<()> {
    let mut orders = Vec::new();
    for port in 1..=MANY {
        let key = address("10.96.1.1", port, Protocol::Tcp)?;
        orders.push(Order::AddService(key, settings("rr", &key)));
    }
    carry_out(client, &orders).await?;
    let mut ports: Vec<u16> = client
        .services()
        .await?
        .iter()
        .filter_map(|service| match service.key {
            ServiceKey::Address(addr) => Some(addr.port),
            ServiceKey::Mark { .. } => None,
        })
        .collect();
    ports.sort_unstable();
    ensure!(
        ports == (1..=MANY).collect::<Vec<_>>(),
        "{} services",
        ports.len()
    );
    client.flush().await?;
    Ok(())
}
