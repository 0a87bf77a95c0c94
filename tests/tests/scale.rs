//! As many volumes as a cluster takes, on one node, with 256 client connections at once: all are served, and an
//! idle volume costs next to no memory.

use std::time::Duration;

use anyhow::{Result, anyhow, ensure};
use blkrepl_tests::client::{Link, Request};
use blkrepl_tests::cluster::SYNC_LIMIT;
use blkrepl_tests::report::measured;
use blkrepl_tests::{Cluster, ClusterOptions, with_cluster};

/// The most that a cluster takes.
const VOLUMES: usize = 64;
/// To each volume: 256 in all.
const CONNECTIONS_EACH: usize = 4;
const SIZE: u64 = 8 << 20;
const BLOCK: usize = 4096;
const PRIMARY: &str = "n1";
/// Of a node with all volumes, before and after the connections; it takes about 60 MiB. With buffers registered whole
/// for each volume it were over 1 GiB.
const RESIDENT_MAX: u64 = 96 << 20;
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

fn name(volume: usize) -> String {
    format!("v{volume:02}")
}

fn check_memory(cluster: &Cluster, when: &str) -> Result<()> {
    for node in [PRIMARY, "n2"] {
        let resident = cluster.memory(node)?.resident;
        measured(
            "scale",
            &format!("{node} {when}: {:.1} MiB resident", resident as f64 / f64::from(1 << 20)),
        );
        ensure!(resident <= RESIDENT_MAX, "{node} {when}: {resident} bytes resident, at most {RESIDENT_MAX}");
    }
    Ok(())
}

/// Every connection writes a block of its own and reads it back, all of them at once.
fn use_all(links: &mut [Link]) -> Result<()> {
    let content = |at: usize| vec![u8::try_from(at % 251).unwrap_or(0) + 1; BLOCK];
    let offset = |at: usize| (at % CONNECTIONS_EACH * BLOCK) as u64;
    for (at, link) in links.iter_mut().enumerate() {
        link.submit(&Request::Write { offset: offset(at), data: content(at), fua: false })?;
    }
    for link in links.iter_mut() {
        link.next(SYNC_LIMIT)?.result.map_err(|reason| anyhow!("a write failed: {reason}"))?;
    }
    for (at, link) in links.iter_mut().enumerate() {
        let read = link.read(offset(at), u32::try_from(BLOCK)?)?;
        ensure!(read == content(at), "connection {at} reads something else than it wrote");
    }
    Ok(())
}

#[test]
fn sixty_four_volumes_and_256_connections_on_one_node() {
    let options = ClusterOptions { create_volume: false, ..ClusterOptions::by_hand(SIZE, 2) };
    with_cluster("scale", options, |cluster| {
        let names: Vec<String> = (0..VOLUMES).map(name).collect();
        for volume in &names {
            cluster.create_volume(volume, SIZE, &[PRIMARY, "n2"])?;
        }
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        cluster.wait_volumes_in_sync(PRIMARY, &names, SYNC_LIMIT)?;
        check_memory(cluster, "with 64 volumes")?;

        let node = cluster.node(PRIMARY)?;
        let uri = node.unix()?;
        let uris = names.iter().map(|volume| uri.replace("/vol0?", &format!("/{volume}?")));
        let mut links = Vec::new();
        for uri in uris {
            for _ in 0..CONNECTIONS_EACH {
                links.push(Link::connect(&uri, CONNECT_LIMIT)?);
            }
        }
        use_all(&mut links)?;
        check_memory(cluster, "with 256 connections")?;

        let size = SIZE.to_string();
        let more = ["volume", "create", "more", "--size", &size, "--replicas", "n1,n2"];
        let refused = cluster.cli(PRIMARY, &more)?;
        ensure!(refused.code() == 1, "a volume too many ended with {}", refused.code());
        ensure!(refused.stderr.contains("64"), "it is not told why: {}", refused.stderr);
        Ok(())
    });
}
