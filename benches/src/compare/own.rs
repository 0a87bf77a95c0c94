//! The floor and blkrepl as subjects of `compare`.
//!
//! blkrepl is one cluster of three data nodes and a witness with three volumes, all with their primary on n1:
//! on n1 and n2 (replicated), on n1 alone (single), on n1 and n3 with n3 stopped (degraded).

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use blkrepl_nbd::NbdUri;
use blkrepl_tests::binary::{target_dir, workspace};
use blkrepl_tests::cluster::{START_LIMIT, SYNC_LIMIT, free_ports};
use blkrepl_tests::proc::{self, Proc};
use blkrepl_tests::wait::wait_for;
use blkrepl_tests::{Cluster, ClusterOptions};

use super::subject::{Address, Subject, allocated};
use super::{CompareOptions, Transport};

/// The floor and its variants.
pub(super) const FLOOR_NAMES: [&str; 3] = ["floor", "floor-local", "floor-no-storage"];
/// blkrepl's volumes; the names are also those of the volumes.
pub(super) const BLKREPL_NAMES: [&str; 3] = ["blkrepl-replicated", "blkrepl-degraded", "blkrepl-single"];

const BUILD_LIMIT: Duration = Duration::from_secs(1200);
/// The node that serves all volumes.
const PRIMARY: &str = "n1";
/// The node that is stopped.
const STOPPED: &str = "n3";

/// The floor program, built once if need be.
fn floor_binary() -> Result<&'static Path> {
    static FOUND: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let found = FOUND.get_or_init(|| build_floor().map_err(|e| format!("{e:#}")));
    found.as_deref().map_err(|reason| anyhow!("no floor program: {reason}"))
}

fn build_floor() -> Result<PathBuf> {
    let target = target_dir()?;
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut build = Command::new(cargo);
    build.args(["build", "--release", "--package", "blkrepl-benches", "--bin", "floor", "--target-dir"]);
    build.arg(&target).current_dir(workspace());
    proc::run(&mut build, BUILD_LIMIT)?.ok()?;
    Ok(target.join("release/floor"))
}

/// Starts the floor, or one of its variants.
pub(super) fn start_floor(name: &'static str, dir: &Path, options: &CompareOptions) -> Result<Subject> {
    let binary = floor_binary()?;
    let address = Address::new(name, dir, options.transport)?;
    let (data, peer_data) = (dir.join(format!("{name}.data")), dir.join(format!("{name}.peer")));
    let mut server = Command::new(binary);
    server.arg("server").arg("--listen");
    if address.is_unix() {
        server.arg(&address.socket);
    } else {
        server.arg(format!("127.0.0.1:{}", address.port));
    }
    let mut procs = Vec::new();
    match name {
        "floor" => {
            allocated(&data, options.size)?;
            allocated(&peer_data, options.size)?;
            let listen = format!("127.0.0.1:{}", free_ports(1)?[0]);
            let mut peer = Command::new(binary);
            peer.arg("peer").args(["--listen", &listen]).arg("--data").arg(&peer_data);
            let peer = Proc::spawn("floor peer", &mut peer, &dir.join("floor-peer.log"))?;
            wait_for("the floor's peer", START_LIMIT, || {
                std::net::TcpStream::connect(&listen).map(drop).context("connect")
            })?;
            procs.push(peer);
            server.arg("--data").arg(&data).args(["--peer", &listen]);
        }
        "floor-local" => {
            allocated(&data, options.size)?;
            server.arg("--data").arg(&data).arg("--local-only");
        }
        _ => {
            server.arg("--no-storage").args(["--size", &options.size.to_string()]);
        }
    }
    let server = Proc::spawn(name, &mut server, &dir.join(format!("{name}.log")))?;
    let pid = server.pid();
    procs.insert(0, server);
    let subject = Subject::ready(name, address.uri(""), procs)?;
    Ok(Subject { primary: Some(pid).filter(|_| name == "floor"), ..subject })
}

/// Starts a cluster with the three volumes, of which those named in `wanted` become subjects; the first owns it.
pub(super) fn start_blkrepl(
    dir: &Path,
    options: &CompareOptions,
    wanted: &[&'static str],
) -> Result<Vec<Subject>> {
    let base = dir.join("blkrepl");
    std::fs::create_dir(&base).with_context(|| format!("make {}", base.display()))?;
    let mut cluster = Cluster::start(ClusterOptions {
        create_volume: false,
        base: Some(base),
        ..ClusterOptions::by_hand(options.size, 3)
    })?;
    for (volume, replicas) in BLKREPL_NAMES.into_iter().zip([&["n1", "n2"][..], &["n1", "n3"], &["n1"]]) {
        cluster.create_volume(volume, options.size, replicas)?;
    }
    cluster.wait_volumes_in_sync(PRIMARY, &BLKREPL_NAMES, SYNC_LIMIT)?;
    cluster.stop_node(STOPPED)?;
    cluster.wait_removed(PRIMARY, &BLKREPL_NAMES, STOPPED, SYNC_LIMIT)?;
    let status = cluster.status_of(PRIMARY)?;
    for volume in BLKREPL_NAMES {
        let primary = &status.volume(volume)?.primary;
        ensure!(primary.as_deref() == Some(PRIMARY), "{volume} has primary {primary:?}");
    }
    subjects(cluster, options.transport, wanted)
}

fn subjects(cluster: Cluster, transport: Transport, wanted: &[&'static str]) -> Result<Vec<Subject>> {
    let primary = cluster.node(PRIMARY)?;
    let uri = match transport {
        Transport::Unix => primary.unix()?,
        Transport::Tcp => primary.tcp()?,
    };
    let uri: NbdUri = uri.parse()?;
    let mut pids = Vec::new();
    for node in cluster.nodes()?.iter().filter(|node| node.name != STOPPED) {
        pids.push(cluster.process(&node.name)?);
    }
    let mut started = Vec::new();
    let process = cluster.process(PRIMARY)?;
    for name in wanted.iter().copied() {
        let uri = NbdUri { export: name.to_owned(), ..uri.clone() };
        let primary = Some(process).filter(|_| name == BLKREPL_NAMES[0]);
        started.push(Subject { pids: pids.clone(), primary, ..Subject::ready(name, uri, Vec::new())? });
    }
    started.first_mut().ok_or_else(|| anyhow!("no volume is wanted"))?.cluster = Some(cluster);
    Ok(started)
}
