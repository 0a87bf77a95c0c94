//! `blkrepl demo`: kills a primary under load and shows that nothing is lost.
//!
//! Everything is done from outside, through the interfaces that users have: processes and signals, the
//! admin socket, NBD. It judges by comparing bytes, not by asking the nodes. Exit code 0 only if every
//! check held. Numbers are measured and printed, never judged against a limit, but for the bytes that a
//! resync may move.

pub mod compare;
pub mod timeline;
pub mod writer;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::process::Signal;

use crate::admin::client::{self, ANSWER_TIMEOUT};
use crate::admin::{Done, DurabilityWord, Request, VolumeView};
use crate::cli::DemoArgs;
use crate::dev::{self, DevCluster};
use crate::events::EventRecord;
use crate::node_dir;
use crate::render::bytes;
use crate::signals::Interrupt;
use timeline::{Timeline, millis};
use writer::{Prober, Seen, Target, Writer};

/// Volume size for small files.
const SIZE_MIN: u64 = 64 << 20;
/// Name of the volume.
const VOLUME: &str = "vol0";
/// How long a replica may take to get in sync, or a volume to be served.
const WAIT_MAX: Duration = Duration::from_secs(120);
/// How long the demo watches that the returned node does not take its role back.
const WATCH_ROLE: Duration = Duration::from_secs(1);

/// Runs the demo.
///
/// # Errors
/// Something did not hold or could not be done.
pub fn run(args: &DemoArgs, json: bool) -> anyhow::Result<()> {
    let interrupt = Interrupt::install().context("cannot install signal handlers")?;
    let path = match &args.file {
        Some(path) => path.clone(),
        None => std::env::current_exe().context("cannot find the path of this executable")?,
    };
    let file =
        File::open(&path).with_context(|| format!("cannot open {}; name a readable file", path.display()))?;
    let len = file.metadata()?.len();
    if len == 0 {
        bail!("{} is empty (or no regular file); name a file with content", path.display());
    }
    let size = args.size.unwrap_or_else(|| SIZE_MIN.max(len.next_multiple_of(1 << 20) + (1 << 20)));
    if len > size {
        bail!("{} has {len} bytes and does not fit into {size}; give a larger --size", path.display());
    }
    let place = Place::new(args)?;
    let mut timeline = Timeline::new(json);
    timeline.measured().file_bytes = len;
    timeline.note(format!("writes {} ({}) in {}", path.display(), bytes(len), place.dir.display()));
    let dev = DevCluster::start(&place.dir, VOLUME, size, DurabilityWord::Flush, &args.timing, &interrupt);
    let mut demo = Demo { dev: dev?, file, path, len, size, interrupt, timeline };
    let outcome = demo.play();
    let outcome = match outcome {
        Ok(()) if args.keep => demo.keep(),
        other => {
            demo.dev.supervisor.stop_all();
            other
        }
    };
    let interrupted = demo.interrupt.is_set();
    let usage = dev::usage(&demo.dev);
    let result = demo.timeline.finish();
    if json {
        println!("{}", serde_json::to_string_pretty(&result)?);
    }
    if args.keep && outcome.is_ok() {
        let dir = place.keep();
        if !json {
            println!(
                "\n{usage}, after: blkrepl dev --dir {} (it takes the running nodes over)",
                dir.display()
            );
        }
    } else if !interrupted && (outcome.is_err() || !result.ok) {
        let dir = place.keep();
        eprintln!("blkrepl: what is left of the demo is in {} (logs in n1, n2, n3)", dir.display());
    }
    outcome?;
    let broken: Vec<&str> = result.checks.iter().filter(|c| !c.held).map(|c| c.text.as_str()).collect();
    if !broken.is_empty() {
        bail!("did not hold: {}", broken.join("; "));
    }
    if !json {
        println!("everything held");
    }
    Ok(())
}

/// Where the demo takes place.
struct Place {
    dir: PathBuf,
    temp: Option<tempfile::TempDir>,
}

impl Place {
    fn new(args: &DemoArgs) -> anyhow::Result<Self> {
        if let Some(dir) = &args.dir {
            let taken = std::fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_some());
            if taken {
                bail!("{} is not empty; name a directory that does not exist yet", dir.display());
            }
            return Ok(Self { dir: dir.clone(), temp: None });
        }
        let temp = tempfile::Builder::new()
            .prefix("blkrepl-demo-")
            .tempdir()
            .context("cannot make a temporary directory")?;
        Ok(Self { dir: temp.path().to_path_buf(), temp: Some(temp) })
    }

    /// Leaves the directory.
    fn keep(self) -> PathBuf {
        self.temp.map_or(self.dir, tempfile::TempDir::keep)
    }
}

struct Demo {
    dev: DevCluster,
    file: File,
    path: PathBuf,
    len: u64,
    size: u64,
    interrupt: Interrupt,
    timeline: Timeline,
}

impl Demo {
    fn play(&mut self) -> anyhow::Result<()> {
        let volume = self.wait("the volume to be served", |v| v.serving && !v.degraded)?;
        let first = volume.primary.context("a served volume has a primary")?;
        self.timeline.note(format!(
            "three nodes run; volume {VOLUME} of {} is in sync on both data nodes, {first} is primary",
            bytes(self.size)
        ));
        let second = self.write_and_kill(&first)?;
        self.rejoin(&first, &second)?;
        self.planned_move(&second, &first)?;
        self.read_back()?;
        self.stop_and_compare()
    }

    /// Writes the file, kills the primary in the middle, goes on. Gives the new primary.
    fn write_and_kill(&mut self, first: &str) -> anyhow::Result<String> {
        let targets = self.targets()?;
        let index = self.dev.index(first).context("the primary is one of the nodes")?;
        let pid = self.dev.supervisor.pid(index).context("the primary's process is gone")?;
        let writer =
            Writer { targets: &targets, file: &self.file, len: self.len, interrupt: &self.interrupt };
        let timeline = &mut self.timeline;
        let chunk = writer.chunk();
        let mut killed: Option<Instant> = None;
        let mut again: Option<(Instant, String)> = None;
        let (mut before, mut after) = (0u64, 0u64);
        writer.run(|seen| {
            match seen {
                Seen::InFlight { acked, total } if killed.is_none() && acked >= total / 2 => {
                    if !node_dir::signal(pid, Signal::KILL) {
                        bail!("cannot kill process {pid}");
                    }
                    killed = Some(Instant::now());
                    timeline.note(format!(
                        "SIGKILL to {first} (process {pid}) after {} of {} chunks were acknowledged, more \
                        in flight",
                        acked, total
                    ));
                }
                Seen::Lost => timeline.note("the client lost its connection and looks for the new primary"),
                Seen::Acked { bytes, node } if node == first => before += bytes,
                Seen::Acked { bytes, node } => {
                    after += bytes;
                    if again.is_none() {
                        again = Some((Instant::now(), node.to_string()));
                        timeline.note(format!("{node} is primary and acknowledged the first replayed write"));
                    }
                }
                // A small file may be acknowledged as a whole before the kill; its flush is not.
                Seen::Flushed { node } if node != first && again.is_none() => {
                    again = Some((Instant::now(), node.to_string()));
                    timeline.note(format!("{node} is primary and answered the flush"));
                }
                Seen::InFlight { .. } | Seen::Flushed { .. } => {}
            }
            Ok(())
        })?;
        let (Some(killed), Some((at, second))) = (killed, again) else {
            bail!("the primary was never replaced; there is nothing to show");
        };
        let service_again = millis(at - killed);
        self.timeline.note(format!(
            "all of {} is written and flushed ({} before the kill, {} after); service was back after \
            {service_again} ms",
            self.path.display(),
            bytes(before),
            bytes(after)
        ));
        // What was in flight at the kill counts as changed, too: it may be on one replica only.
        let changed = after + chunk * writer::WINDOW as u64;
        self.timeline.measured().service_again_ms = Some(service_again);
        self.timeline.measured().changed_bytes = Some(changed);
        self.timeline.check(second != first, format!("the secondary {second} took over"));
        Ok(second)
    }

    /// Starts the killed node again and waits until it is in sync; it must stay secondary.
    fn rejoin(&mut self, old: &str, new: &str) -> anyhow::Result<()> {
        let index = self.dev.index(old).context("the node is one of the three")?;
        self.dev.supervisor.reap();
        let begin = Instant::now();
        let pid = self.dev.supervisor.start(index)?;
        self.dev.refresh()?;
        self.timeline.note(format!("{old} is started again (process {pid})"));
        let name = old.to_string();
        self.wait("the returned replica to be in sync", |v| v.in_sync.contains(&name) && !v.degraded)?;
        let took = millis(begin.elapsed());
        let moved = self.moved_bytes(new, old)?;
        let changed = self.timeline.measured().changed_bytes.unwrap_or(0);
        self.timeline.measured().rejoin_ms = Some(took);
        self.timeline.measured().moved_bytes = Some(moved);
        self.timeline.note(format!(
            "{old} is in sync again after {took} ms; the resync moved {} (at most {} had changed, the \
            volume has {})",
            bytes(moved),
            bytes(changed),
            bytes(self.size)
        ));
        self.timeline
            .check(moved <= 2 * changed + (1 << 20), "the resync moved what had changed, not the volume");
        std::thread::sleep(WATCH_ROLE);
        let volume = self.volume()?;
        self.timeline.check(
            volume.primary.as_deref() == Some(new) && volume.serving,
            format!("{old} did not take its role back: {new} is still primary"),
        );
        Ok(())
    }

    /// A planned change of primary, with a client writing all the time.
    fn planned_move(&mut self, from: &str, to: &str) -> anyhow::Result<()> {
        let mut content = vec![0; usize::try_from(self.len.min(4096))?];
        std::os::unix::fs::FileExt::read_exact_at(&self.file, &mut content, 0)?;
        let prober = Prober::start(self.targets()?, content, self.interrupt.clone());
        std::thread::sleep(Duration::from_millis(500));
        let quiet = prober.take_worst_ms();
        let index = self.dev.index(from).context("the node is one of the three")?;
        let admin = self.dev.supervisor.nodes[index].config.admin.clone();
        let request = Request::Move { volume: VOLUME.to_string(), to: to.to_string() };
        let moved: Result<Done, _> = client::ask(&admin, &request, ANSWER_TIMEOUT);
        std::thread::sleep(Duration::from_millis(500));
        let stall = prober.take_worst_ms();
        prober.stop()?;
        moved.with_context(|| format!("cannot move {VOLUME} from {from} to {to}"))?;
        self.timeline.measured().quiet_stall_ms = Some(quiet);
        self.timeline.measured().move_stall_ms = Some(stall);
        self.timeline.note(format!(
            "moved {VOLUME} from {from} to {to} by command; a writing client paused for {stall} ms \
            (longest pause without a move: {quiet} ms)"
        ));
        let volume = self.volume()?;
        let held = volume.primary.as_deref() == Some(to) && !volume.degraded;
        self.timeline.check(held, format!("after the move {to} is primary and both replicas are in sync"));
        Ok(())
    }

    fn read_back(&mut self) -> anyhow::Result<()> {
        let (node, mut client) = writer::connect(&self.targets()?, &self.interrupt)?;
        let difference = compare::volume(&mut client, &self.file, self.len)
            .with_context(|| format!("cannot read {VOLUME} back from {node}"))?;
        let leaving = client.disconnect();
        tracing::debug!("client left: {leaving:?}");
        self.timeline.note(format!("read {} back through {node}", bytes(self.len)));
        self.timeline.check(difference.is_none(), verdict("what clients read is the file", difference));
        Ok(())
    }

    fn stop_and_compare(&mut self) -> anyhow::Result<()> {
        let killed = self.dev.supervisor.stop_all();
        self.dev.refresh()?;
        self.timeline.note("all nodes stopped");
        self.timeline.check(killed.is_empty(), "every node stopped cleanly");
        let data: Vec<PathBuf> =
            self.dev.supervisor.cluster_json(self.size).nodes.into_iter().filter_map(|n| n.data).collect();
        let [a, b] = data.as_slice() else { bail!("there are not two data files") };
        let compare = |x: &Path, y: &Path, len| {
            compare::files(x, y, len)
                .with_context(|| format!("cannot compare {} and {}", x.display(), y.display()))
        };
        let difference = compare(a, b, self.size)?;
        self.timeline.check(
            difference.is_none(),
            verdict(
                &format!("both data files ({}) are identical, byte for byte", bytes(self.size)),
                difference,
            ),
        );
        let difference = compare(a, &self.path, self.len)?;
        self.timeline.check(difference.is_none(), verdict("the data files hold the file", difference));
        Ok(())
    }

    /// Starts the nodes again after the comparison, and leaves them.
    fn keep(&mut self) -> anyhow::Result<()> {
        self.dev.supervisor.start_all()?;
        self.wait("the volume to be served again", |v| v.serving)?;
        self.dev.refresh()?;
        self.timeline.note("the nodes run again and are left running");
        Ok(())
    }

    fn targets(&self) -> anyhow::Result<Vec<Target>> {
        let nodes = self.dev.supervisor.cluster_json(self.size).nodes;
        nodes
            .into_iter()
            .filter_map(|n| Some((n.name, n.nbd_unix?)))
            .map(|(node, uri)| Ok(Target { node, uri: uri.parse()? }))
            .collect()
    }

    fn volume(&self) -> anyhow::Result<VolumeView> {
        let view = self.dev.status()?;
        view.volumes.into_iter().find(|v| v.name == VOLUME).context("the volume is gone from cluster state")
    }

    fn wait(&self, what: &str, done: impl Fn(&VolumeView) -> bool) -> anyhow::Result<VolumeView> {
        let give_up = Instant::now() + WAIT_MAX;
        let mut last = String::new();
        while Instant::now() < give_up {
            if self.interrupt.is_set() {
                bail!("interrupted");
            }
            match self.volume() {
                Ok(volume) if done(&volume) => return Ok(volume),
                Ok(volume) => last = crate::render::volume(&volume),
                Err(error) => last = error.to_string(),
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        bail!("waited {} s for {what}; last seen:\n{last}", WAIT_MAX.as_secs())
    }

    /// Bytes that resyncs from `source` into `target` moved, by the source's events.
    fn moved_bytes(&self, source: &str, target: &str) -> anyhow::Result<u64> {
        let index = self.dev.index(source).context("the node is one of the three")?;
        let admin = &self.dev.supervisor.nodes[index].config.admin;
        let request = Request::Events { after: 0, follow: false };
        let events: Vec<EventRecord> = client::ask(admin, &request, ANSWER_TIMEOUT)?;
        let moved = events
            .iter()
            .filter(|e| {
                e.kind == "resync_finished" && e.data.get("peer").and_then(|p| p.as_str()) == Some(target)
            })
            .filter_map(|e| e.data.get("moved_bytes")?.as_u64())
            .sum();
        Ok(moved)
    }
}

fn verdict(text: &str, difference: Option<u64>) -> String {
    difference.map_or_else(|| text.to_string(), |at| format!("{text} (first difference at byte {at})"))
}
