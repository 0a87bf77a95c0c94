//! Wrong input and a hostile environment: each gets an error that names file, key, address or peer and
//! the next step, and loses nothing. What concerns data and metadata on disk is in `bad_disk.rs`.

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use blkrepl_tests::binary::blkrepl;
use blkrepl_tests::cluster::{FAILOVER_LIMIT, SYNC_LIMIT};
use blkrepl_tests::proc::{Finished, run};
use blkrepl_tests::verify::connect_any;
use blkrepl_tests::wait::{wait_for, wait_until};
use blkrepl_tests::{Cluster, ClusterOptions, scenario, with_cluster};
use rustix::process::Signal;

const SIZE: u64 = 32 << 20;
/// A start that is refused ends well within this.
const REFUSAL: Duration = Duration::from_secs(15);

fn refused(done: &Finished, words: &[&str]) -> Result<()> {
    ensure!(done.code() == 1, "{}: exit code {}, expected 1\n{}", done.shown, done.code(), done.text());
    for word in words {
        ensure!(done.stderr.contains(word), "{}: the error lacks {word:?}: {}", done.shown, done.stderr);
    }
    ensure!(!done.stderr.contains("panicked"), "{}: a panic is no error: {}", done.shown, done.stderr);
    Ok(())
}

#[test]
fn a_bad_config_is_refused_by_file_line_and_key() {
    let make = || Cluster::prepare(ClusterOptions::by_hand(SIZE, 2));
    scenario("bad_config", make, |cluster| {
        let config = cluster.node("n1")?.config;
        let good = fs::read_to_string(&config)?;
        let file = config.display().to_string();
        let control = good.lines().find(|l| l.starts_with("control = ")).context("a control line")?;
        let cases: [(&str, String, &[&str]); 8] = [
            ("unknown key", good.replacen("[node]\n", "[node]\ncolour = \"red\"\n", 1), &["colour"]),
            ("unknown table", format!("{good}\n[surprise]\nx = 1\n"), &["surprise"]),
            ("no TOML", good.replacen("[node]", "[node", 1), &["line"]),
            ("wrong type", good.replacen("id = 1", "id = \"one\"", 1), &["id"]),
            ("missing key", good.replacen("name = \"n1\"\n", "", 1), &["name"]),
            ("kind unknown", good.replacen("kind = \"data\"", "kind = \"boss\"", 1), &["boss", "witness"]),
            ("no address", good.replacen(control, "control = \"nowhere\"", 1), &["control", "nowhere"]),
            ("not in the cluster", good.replacen("id = 1", "id = 77", 1), &["77"]),
        ];
        for (name, text, words) in cases {
            ensure!(text != good, "{name}: the case changes nothing");
            fs::write(&config, text)?;
            for command in ["init", "serve"] {
                let done = cluster.command(&[command.as_ref(), "--config".as_ref(), config.as_os_str()])?;
                refused(&done, words).context(name)?;
                refused(&done, &[&file]).context(name)?;
            }
        }
        fs::write(&config, good)?;
        let nowhere = cluster.dir().join("no-such.toml");
        let done = cluster.command(&["serve".as_ref(), "--config".as_ref(), nowhere.as_os_str()])?;
        refused(&done, &["no-such.toml"])?;
        // A store is never made by a start: losing it must not look like a first start [R13].
        refused(&cluster.serve_until_end("n1", REFUSAL)?, &["init"])
    });
}

#[test]
fn init_does_not_overwrite_a_store() {
    with_cluster("init_twice", ClusterOptions::by_hand(SIZE, 2), |cluster| {
        cluster.stop()?;
        let config = cluster.node("n1")?.config;
        let done = cluster.command(&["init".as_ref(), "--config".as_ref(), config.as_os_str()])?;
        let dir = config.parent().unwrap_or(Path::new("/")).display().to_string();
        refused(&done, &[&dir])?;
        cluster.start_all()
    });
}

#[test]
fn a_port_in_use_is_named() {
    with_cluster("port_in_use", ClusterOptions::by_hand(SIZE, 2), |cluster| {
        let node = cluster.node("n2")?;
        let text = fs::read_to_string(&node.config)?;
        let config: toml::Table = toml::from_str(&text)?;
        for key in ["control", "peer", "nbd_tcp"] {
            let address = config["listen"][key].as_str().context("an address")?;
            cluster.stop_node("n2")?;
            let taken = wait_for("the port", Duration::from_secs(5), || Ok(TcpListener::bind(address)?))?;
            refused(&cluster.serve_until_end("n2", REFUSAL)?, &[address]).context(key)?;
            drop(taken);
            cluster.restart("n2")?;
            cluster.wait_in_sync(SYNC_LIMIT)?;
        }
        Ok(())
    });
}

#[test]
fn a_second_daemon_on_a_directory_is_locked_out() {
    with_cluster("second_daemon", ClusterOptions::sized(SIZE), |cluster| {
        let before = cluster.volume_status()?;
        let mut link = connect_any(&cluster.targets()?, FAILOVER_LIMIT)?;
        link.write(0, &[0x11; 4096])?;
        for node in cluster.nodes()? {
            let dir = node.config.parent().unwrap_or(Path::new("/")).display().to_string();
            refused(&cluster.serve_until_end(&node.name, REFUSAL)?, &[&dir])?;
        }
        let mut dev = Command::new(blkrepl()?);
        let done = run(dev.arg("dev").arg("--dir").arg(cluster.dir()), REFUSAL)?;
        refused(&done, &[&cluster.dir().display().to_string()])?;
        // The first ones did not notice.
        ensure!(link.read(0, 4096)? == [0x11; 4096], "the connection still serves");
        let after = cluster.wait_in_sync(SYNC_LIMIT)?;
        ensure!(after.epoch == before.epoch, "the config changed: {} to {}", before.epoch, after.epoch);
        Ok(())
    });
}

#[test]
fn a_kernel_that_forbids_io_uring_is_explained() {
    with_cluster("no_io_uring", ClusterOptions::by_hand(SIZE, 2), |cluster| {
        let node = cluster.secondary()?;
        let mut link = connect_any(&cluster.targets()?, FAILOVER_LIMIT)?;
        link.write(0, &[0x11; 4096])?;
        cluster.kill(&node)?;
        link.write(4096, &[0x22; 4096])?;
        cluster.restart_under(&node, Path::new(env!("CARGO_BIN_EXE_no_io_uring")))?;
        // Either the whole node refuses to start, or it runs and reports its replica as failed; in both
        // cases the text names the switch.
        wait_until("the reason in the node's log", FAILOVER_LIMIT, || {
            let log = cluster.log(&node);
            log.contains("io_uring") && log.contains("kernel.io_uring_disabled")
        })
        .with_context(|| format!("log of {node}: {}", cluster.log(&node)))?;
        ensure!(!cluster.log(&node).contains("panicked"), "a panic is no error: {}", cluster.log(&node));
        if cluster.runs(&node)? {
            let status = cluster.status_of(&node)?;
            let replica = status.volume(cluster.volume())?.replica(&node)?.clone();
            ensure!(replica.state == "failed", "{node} is {}", replica.state);
            cluster.signal(&node, Signal::KILL)?;
        }
        ensure!(link.read(4096, 4096)? == [0x22; 4096], "the primary does not serve on");
        wait_until("the end of the node", FAILOVER_LIMIT, || !cluster.runs(&node).unwrap_or(true))?;
        cluster.restart(&node)?;
        cluster.wait_in_sync(SYNC_LIMIT)?;
        cluster.compare_replicas()
    });
}
