//! `blkrepl map`, `unmap` and `mapped`: a volume as a block device of this machine, /dev/nbdN, that outlives its
//! primary.
//!
//! ```text
//! keeper      keeps a device on the primary of its volume
//! locator     finds that primary, starting from the address of any node
//! front_end   what a keeper needs of whatever shows the device; kernel: the NBD client of the kernel
//! netlink     how the kernel is asked
//! device      what is mapped, as the kernel has it
//! record      what a keeper says of itself
//! ```
//!
//! The device belongs to the kernel. No process is in the way of its requests, and the keeper may end and start again
//! under load; it is needed only when a connection has died. What is mapped is read from the kernel alone.

pub mod device;
pub mod front_end;
pub mod keeper;
pub mod kernel;
pub mod locator;
pub mod netlink;
pub mod record;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use blkrepl_nbd::{NbdError, RefusalKind, Target};
use serde::Serialize;

use crate::cli::{MapArgs, UnmapArgs};
use crate::signals::Interrupt;
use crate::{config, memory, ops, render};
use device::{Identity, Mapped};
use front_end::KernelDevice;
use keeper::{Ending, Keeper};
use kernel::{KernelNbd, Shape};
use locator::{Found, Locator, Refusals, target_of};
use record::{RUN_DIR, Recorder};

/// Config of this machine's node, from which the addresses of the cluster come if none are given.
pub const CONFIG_DEFAULT: &str = "/etc/blkrepl/node.toml";
/// Pause between two searches for the primary before there is a device.
const SEARCH_PAUSE: Duration = Duration::from_millis(250);

/// Maps a volume and keeps its device on the primary, until SIGTERM, or until it is unmapped.
///
/// # Errors
/// What is in the way.
pub fn map(args: &MapArgs) -> Result<()> {
    config::check_name(&args.volume).map_err(anyhow::Error::msg)?;
    let seeds = seeds(args)?;
    // What serves a block device must not wait for memory that only its own writes would free.
    memory::hold_for_block_io();
    let dir = Path::new(RUN_DIR);
    let _lock = record::lock(dir, &args.volume)?;
    let interrupt = Interrupt::install().context("cannot handle signals")?;
    let mut kernel = KernelNbd::open()?;
    let recorder = Recorder::new(dir, &args.volume);
    let ending = match existing(args)? {
        Some(mapped) => take_over(kernel, mapped, seeds, recorder, &interrupt)?,
        None => {
            let session = ops::random_id().map_err(anyhow::Error::msg)?;
            let mut locator = Locator::new(&args.volume, session, seeds);
            let Some(found) = wait_for_primary(&mut locator, &interrupt)? else { return Ok(()) };
            let shape = shape(args, session, &found)?;
            let index = kernel.connect(args.device, &shape, &found.connection)?;
            announce(&args.volume, index);
            let mut front = KernelDevice { kernel, index, identity: shape.identity };
            Keeper::of_new(&mut front, locator, recorder, found).keep(&interrupt)?
        }
    };
    match ending {
        Ending::Unmapped => record::forget(dir, &args.volume),
        Ending::Stopped => tracing::info!("volume {} stays mapped; nobody keeps it now", args.volume),
    }
    Ok(())
}

/// The device that shows the volume already.
fn existing(args: &MapArgs) -> Result<Option<Mapped>> {
    let Some(mapped) = device::all()?.into_iter().find(|m| m.identity.volume == args.volume) else {
        return Ok(None);
    };
    if record::has_ended(Path::new(RUN_DIR), &mapped.identity) {
        let user = device::user(&mapped).unwrap_or_else(|| "something has it open".to_owned());
        bail!(
            "{} was unmapped while in use, and still is: {user}; end that first, then `blkrepl unmap {}` if it is \
             still there",
            mapped.node().display(),
            args.volume
        );
    }
    if args.device.is_some_and(|wanted| wanted != mapped.index) {
        bail!("volume {} is mapped as {} already; unmap it first", args.volume, mapped.node().display());
    }
    Ok(Some(mapped))
}

/// Goes on with a device that an earlier keeper made.
fn take_over(
    kernel: KernelNbd,
    mapped: Mapped,
    seeds: Vec<Target>,
    recorder: Recorder,
    interrupt: &Interrupt,
) -> Result<Ending> {
    let Mapped { index, identity, .. } = mapped;
    // The earlier one may have ended before it was done.
    kernel::tune(index);
    announce(&identity.volume, index);
    let locator = Locator::new(&identity.volume, identity.session, seeds);
    let mut front = KernelDevice { kernel, index, identity };
    Keeper::of_old(&mut front, locator, recorder).keep(interrupt)
}

fn announce(volume: &str, index: u32) {
    use std::io::Write;
    // Whoever waits for this line may be gone.
    let _unread =
        writeln!(std::io::stdout(), "volume {volume} is mapped as {}", device::node(index).display());
}

/// Nodes of the cluster: those named on the command line, else those of this machine's node.
fn seeds(args: &MapArgs) -> Result<Vec<Target>> {
    if !args.nodes.is_empty() {
        return Ok(args.nodes.clone());
    }
    let given = args.config.clone();
    let file = given.clone().unwrap_or_else(|| PathBuf::from(CONFIG_DEFAULT));
    if given.is_none() && !file.exists() {
        bail!(
            "where is the cluster? Name at least one of its nodes with --node HOST:PORT (its NBD address), or the \
             config of this machine's node with --config; there is no {CONFIG_DEFAULT}"
        );
    }
    let config = config::load(&file)?;
    // The node of this machine first: its socket needs no network.
    let own = (config.kind == config::Kind::Data).then(|| Target::Unix(config.nbd_unix.clone()));
    let others = config.founders.iter().filter(|f| f.id != config.id).filter_map(|f| target_of(&f.nbd));
    let seeds: Vec<Target> = own.into_iter().chain(others).collect();
    if seeds.is_empty() {
        bail!("{} names no NBD address of a node; give one with --node HOST:PORT", file.display());
    }
    Ok(seeds)
}

/// Waits for a primary; `None` if it is not to wait any longer.
///
/// # Errors
/// The cluster has no such volume.
fn wait_for_primary(locator: &mut Locator, interrupt: &Interrupt) -> Result<Option<Found>> {
    let mut told: Option<Instant> = None;
    while !interrupt.is_set() {
        let refusals = match locator.find() {
            Ok(found) => return Ok(Some(found)),
            Err(refusals) => refusals,
        };
        if let Some(reason) = hopeless(&refusals) {
            bail!("{reason}");
        }
        if told.is_none_or(|at| at.elapsed() >= keeper::TELL) {
            tracing::warn!("no node serves the volume yet: {}", keeper::explain(&refusals));
            told = Some(Instant::now());
        }
        std::thread::sleep(SEARCH_PAUSE);
    }
    Ok(None)
}

/// Why waiting will not help: whoever answers knows no such volume, or is no node of a cluster.
fn hopeless(refusals: &Refusals) -> Option<String> {
    let is_final = |error: &NbdError| match error {
        NbdError::Refused { kind, .. } => !matches!(kind, RefusalKind::Policy | RefusalKind::Shutdown),
        error => !error.is_transient(),
    };
    let answers = refusals.values().filter(|error| !matches!(error, NbdError::Connect { .. }));
    let mut all = answers.peekable();
    (all.peek().is_some() && all.all(is_final)).then(|| keeper::explain(refusals))
}

/// The shape of a new device.
fn shape(args: &MapArgs, session: u128, found: &Found) -> Result<Shape> {
    let (target, facts) = (&found.target, &found.facts);
    let lineage = facts.lineage.with_context(|| format!("{target} does not say what it serves"))?;
    Ok(Shape {
        identity: Identity { volume: args.volume.clone(), lineage, session },
        size: facts.size - facts.size % u64::from(args.block_size),
        block_size: args.block_size,
        flags: facts.flags,
        give_up_after: args.give_up_after.map(Duration::from_secs),
    })
}

/// Ends a mapping.
///
/// # Errors
/// It is in use, and this is not forced.
pub fn unmap(args: &UnmapArgs) -> Result<Unmapped> {
    let mapped = device::find(&args.what)?;
    let node = mapped.node();
    let user = if args.force { None } else { device::user(&mapped) };
    if let Some(user) = user {
        bail!(
            "{} is in use: {user}; unmount it first (--force ends it at once: what was not written is lost, and \
             whoever uses it gets errors)",
            node.display()
        );
    }
    let dir = Path::new(RUN_DIR);
    // Before the end, so that nobody goes on with it meanwhile.
    record::note_end(dir, &mapped.identity)?;
    if let Err(error) = KernelNbd::open().and_then(|mut kernel| Ok(kernel.disconnect(mapped.index)?)) {
        record::forget_end(dir, &mapped.identity.volume);
        return Err(error.context(format!("cannot unmap {}", node.display())));
    }
    record::forget(dir, &mapped.identity.volume);
    let text = format!("volume {} is no longer mapped as {}", mapped.identity.volume, node.display());
    Ok(Unmapped { volume: mapped.identity.volume, device: node, text })
}

/// What `unmap` did.
#[derive(Clone, Debug, Serialize)]
pub struct Unmapped {
    /// The volume.
    pub volume: String,
    /// The device that it was.
    pub device: PathBuf,
    /// In words.
    #[serde(skip)]
    pub text: String,
}

/// A mapped volume, for people and tools.
#[derive(Clone, Debug, Serialize)]
pub struct MappedView {
    /// The device.
    pub device: PathBuf,
    /// The volume.
    pub volume: String,
    /// Bytes.
    pub size: u64,
    /// Logical and physical block size, bytes.
    pub block_size: u32,
    /// The process that keeps it; none: it goes on only as long as its connections do.
    pub keeper: Option<u32>,
    /// Who uses it, in words.
    pub user: Option<String>,
    /// It was unmapped while in use: the device is there, and every request fails.
    pub ended: bool,
    /// What the keeper says.
    #[serde(flatten)]
    pub record: record::Record,
}

/// All that is mapped on this machine.
///
/// # Errors
/// There is no sysfs.
pub fn mapped() -> Result<Vec<MappedView>> {
    let dir = Path::new(RUN_DIR);
    let view = |mapped: Mapped| MappedView {
        device: mapped.node(),
        size: mapped.size,
        block_size: mapped.block_size,
        keeper: record::keeper(dir, &mapped.identity.volume),
        user: device::user(&mapped),
        ended: record::has_ended(dir, &mapped.identity),
        record: record::read(dir, &mapped.identity.volume).unwrap_or_default(),
        volume: mapped.identity.volume,
    };
    Ok(device::all()?.into_iter().map(view).collect())
}

/// `blkrepl mapped` as a table.
pub fn table(all: &[MappedView]) -> String {
    if all.is_empty() {
        return "No volume is mapped on this machine. Map one with: blkrepl map VOLUME\n".to_owned();
    }
    let row = |m: &MappedView| {
        let state = match (&m.record.primary, m.keeper) {
            _ if m.ended => "unmapped while in use".to_owned(),
            (_, None) => "nobody keeps it: run blkrepl map again".to_owned(),
            (Some(primary), _) => format!("connected to {primary}"),
            (None, _) => "waiting for its primary".to_owned(),
        };
        let keeper = m.keeper.map_or_else(|| "-".to_owned(), |pid| pid.to_string());
        let used = m.user.as_deref().unwrap_or("-").to_owned();
        let device = m.device.display().to_string();
        vec![
            m.volume.clone(),
            device,
            render::bytes(m.size),
            keeper,
            m.record.reconnects.to_string(),
            state,
            used,
        ]
    };
    let rows: Vec<Vec<String>> = all.iter().map(row).collect();
    render::table(&["VOLUME", "DEVICE", "SIZE", "KEEPER", "RECONNECTS", "STATE", "USED"], &rows)
}

/// The volume that a device such as `nbd0` shows, for the udev rule.
///
/// # Errors
/// It shows none.
pub fn volume_of(name: &str) -> Result<String> {
    let index = device::parse_node(&format!("/dev/{name}")).map_err(anyhow::Error::msg)?;
    let identity = device::identity(index).with_context(|| format!("look at {name}"))?;
    let identity = identity.with_context(|| format!("{name} shows no volume"))?;
    Ok(identity.volume)
}
