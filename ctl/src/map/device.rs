//! The kernel's NBD devices that show volumes, as sysfs has them.
//!
//! The kernel is the only record of what is mapped: each device bears an [`Identity`] that outlives every process.
//! Reads sysfs and procfs only; never changes a device.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result, anyhow, bail};

use crate::config::check_name;

const PREFIX: &str = "blkrepl";
/// Bytes in a sector, as sysfs counts.
const SECTOR: u64 = 512;

/// What a device shows, and in which client session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The volume's name.
    pub volume: String,
    /// The lineage of its content: the device goes on with no other.
    pub lineage: u128,
    /// The client session of its connections.
    pub session: u128,
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}:{}:{:032x}:{:032x}", self.volume, self.lineage, self.session)
    }
}

impl FromStr for Identity {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let parts: Vec<&str> = text.split(':').collect();
        let [PREFIX, volume, lineage, session] = parts[..] else { return Err(()) };
        check_name(volume).map_err(drop)?;
        let hex = |text: &str| match text.len() {
            32 => u128::from_str_radix(text, 16).map_err(drop),
            _ => Err(()),
        };
        Ok(Self { volume: volume.to_owned(), lineage: hex(lineage)?, session: hex(session)? })
    }
}

/// A device that shows a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapped {
    /// Its number.
    pub index: u32,
    /// What it shows.
    pub identity: Identity,
    /// Bytes.
    pub size: u64,
    /// Block size, bytes.
    pub block_size: u32,
}

impl Mapped {
    /// Its device node.
    pub fn node(&self) -> PathBuf {
        node(self.index)
    }
}

/// The device node of a number.
pub fn node(index: u32) -> PathBuf {
    PathBuf::from(format!("/dev/nbd{index}"))
}

/// Where sysfs has a device.
pub fn sysfs(index: u32) -> PathBuf {
    PathBuf::from(format!("/sys/block/nbd{index}"))
}

/// The number in the name of a device node such as `/dev/nbd0`.
///
/// # Errors
/// A sentence that says what is allowed.
pub fn parse_node(text: &str) -> Result<u32, String> {
    let digits = text.strip_prefix("/dev/nbd").unwrap_or_default();
    let good = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
    let index = digits.parse().ok().filter(|_| good && (digits == "0" || !digits.starts_with('0')));
    index.ok_or_else(|| format!("'{text}' is not an NBD device; they are named /dev/nbd0, /dev/nbd1, ..."))
}

/// What a device shows; `None` if it is none of ours.
///
/// # Errors
/// sysfs cannot be read: that says nothing of the device.
pub fn identity(index: u32) -> io::Result<Option<Identity>> {
    match fs::read_to_string(sysfs(index).join("backend")) {
        Ok(text) => Ok(text.trim().parse().ok()),
        // The device, or its backend, went while it was read.
        Err(e) if e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(libc::ENODEV) => Ok(None),
        Err(error) => Err(error),
    }
}

/// What sysfs says of a device, if it shows a volume.
///
/// # Errors
/// As [`identity`].
pub fn mapped(index: u32) -> io::Result<Option<Mapped>> {
    let Some(identity) = identity(index)? else { return Ok(None) };
    let number = |name: &str| fs::read_to_string(sysfs(index).join(name)).ok()?.trim().parse::<u64>().ok();
    let block_size = number("queue/logical_block_size").and_then(|size| u32::try_from(size).ok());
    let size = number("size").map(|sectors| sectors * SECTOR);
    Ok(size.zip(block_size).map(|(size, block_size)| Mapped { index, identity, size, block_size }))
}

/// All devices that show volumes, by number.
///
/// # Errors
/// Where there is no sysfs.
pub fn all() -> Result<Vec<Mapped>> {
    let mut indexes: Vec<u32> = fs::read_dir("/sys/block")
        .map_err(|error| anyhow!("cannot list /sys/block: {error}"))?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.strip_prefix("nbd")?.parse().ok())
        .collect();
    indexes.sort_unstable();
    let devices = indexes.into_iter().filter_map(|index| mapped(index).transpose());
    devices.collect::<io::Result<_>>().context("look at the NBD devices in /sys/block")
}

/// The device that shows a volume; `which` is its name or the device.
///
/// # Errors
/// Says what is mapped instead.
pub fn find(which: &str) -> Result<Mapped> {
    let all = all()?;
    let is_meant = |m: &&Mapped| m.identity.volume == which || m.node() == Path::new(which);
    if let Some(found) = all.iter().find(is_meant) {
        return Ok(found.clone());
    }
    let known: Vec<&str> = all.iter().map(|m| m.identity.volume.as_str()).collect();
    let known =
        if known.is_empty() { "nothing is".to_owned() } else { format!("mapped: {}", known.join(", ")) };
    bail!("{which} is not mapped on this machine; {known}")
}

/// Who uses a device; `None` if nobody does, as far as this machine can tell. Never opens it: that may read it, and
/// wait for a primary that is not there.
pub fn user(device: &Mapped) -> Option<String> {
    let places = places(&sysfs(device.index));
    let numbers = device_numbers(&places);
    mounted(&numbers)
        .or_else(|| built_on(&places))
        .or_else(|| loop_device(&places))
        .or_else(|| swap(&places))
        .or_else(|| opener(&numbers))
}

/// Where sysfs has a disk and its partitions.
fn places(disk: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(disk).into_iter().flatten().filter_map(|e| Some(e.ok()?.path()));
    entries.filter(|path| path.join("partition").exists()).chain([disk.to_owned()]).collect()
}

/// Names of a disk and its partitions, as the kernel has them: `nbd0`, `nbd0p1`.
fn names(places: &[PathBuf]) -> impl Iterator<Item = &str> {
    places.iter().filter_map(|place| place.file_name()?.to_str())
}

/// Device numbers of a disk and its partitions, as procfs and sysfs write them: `43:0`.
fn device_numbers(places: &[PathBuf]) -> Vec<String> {
    let number = |place: &PathBuf| fs::read_to_string(place.join("dev")).ok();
    places.iter().filter_map(number).map(|number| number.trim().to_owned()).collect()
}

/// Processes of this machine, as procfs has them.
fn processes() -> impl Iterator<Item = (String, PathBuf)> {
    let entries = fs::read_dir("/proc").into_iter().flatten().filter_map(Result::ok);
    let named = entries.map(|entry| (entry.file_name().to_string_lossy().into_owned(), entry.path()));
    named.filter(|(pid, _)| pid.bytes().all(|b| b.is_ascii_digit()))
}

/// Where it is mounted, in whichever namespace.
fn mounted(numbers: &[String]) -> Option<String> {
    let mut namespaces = BTreeSet::new();
    for (_, process) in processes() {
        let Ok(namespace) = fs::read_link(process.join("ns/mnt")) else { continue };
        if !namespaces.insert(namespace) {
            continue;
        }
        // proc(5): mount id, parent, device number, root, mount point, ...
        let mounts = fs::read_to_string(process.join("mountinfo")).unwrap_or_default();
        let fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
        let is_its = |f: &Vec<&str>| f.len() > 4 && numbers.iter().any(|number| number == f[2]);
        if let Some(at) = fields.into_iter().find(is_its) {
            return Some(format!("it is mounted at {}", at[4]));
        }
    }
    None
}

/// What the kernel has built on it: device mapper, md; btrfs, whose mounts bear a number of their own.
fn built_on(places: &[PathBuf]) -> Option<String> {
    let holders = |place: &PathBuf| fs::read_dir(place.join("holders")).into_iter().flatten();
    if let Some(Ok(holder)) = places.iter().flat_map(holders).next() {
        return Some(format!("{} is built on it", holder.file_name().to_string_lossy()));
    }
    let systems = fs::read_dir("/sys/fs/btrfs").into_iter().flatten().filter_map(Result::ok);
    let mut devices = systems.map(|system| system.path().join("devices"));
    let on_it = devices.any(|devices| names(places).any(|name| devices.join(name).exists()));
    on_it.then(|| "a mounted btrfs is on it".to_owned())
}

/// A loop device that shows it, or a partition of it: the kernel has it open then, and no process.
fn loop_device(places: &[PathBuf]) -> Option<String> {
    let devices = fs::read_dir("/sys/block").ok()?.filter_map(Result::ok);
    let shows = |device: &fs::DirEntry| {
        let backing = fs::read_to_string(device.path().join("loop/backing_file")).unwrap_or_default();
        let shown = backing.trim_end().strip_prefix("/dev/");
        shown.is_some_and(|shown| names(places).any(|name| name == shown))
    };
    let found = devices.into_iter().find(shows)?;
    Some(format!("/dev/{} shows it", found.file_name().to_string_lossy()))
}

fn swap(places: &[PathBuf]) -> Option<String> {
    let swaps = fs::read_to_string("/proc/swaps").ok()?;
    names(places).any(|name| is_swapped_to(&swaps, name)).then(|| "it is swapped to".to_owned())
}

/// Whether procfs' table of what is swapped to has the device of that name.
fn is_swapped_to(swaps: &str, name: &str) -> bool {
    let mut paths = swaps.lines().filter_map(|line| line.split_whitespace().next());
    paths.any(|path| path.strip_prefix("/dev/") == Some(name))
}

/// A process that has it open.
fn opener(numbers: &[String]) -> Option<String> {
    let me = std::process::id().to_string();
    let number =
        |m: &fs::Metadata| format!("{}:{}", rustix::fs::major(m.rdev()), rustix::fs::minor(m.rdev()));
    let is_it = |fd: &Path| {
        fs::metadata(fd).is_ok_and(|m| m.file_type().is_block_device() && numbers.contains(&number(&m)))
    };
    for (pid, process) in processes().filter(|(pid, _)| *pid != me) {
        let Ok(fds) = fs::read_dir(process.join("fd")) else { continue };
        if fds.filter_map(Result::ok).any(|fd| is_it(&fd.path())) {
            let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
            return Some(format!("process {pid} ({}) has it open", name.trim()));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_is_read_as_it_was_written() {
        let identity = Identity { volume: "db-1.a_b".into(), lineage: u128::MAX - 1, session: 7 };
        assert_eq!(identity.to_string().parse(), Ok(identity));
        for strange in ["", "blkrepl", "blkrepl:a:b:c", "other:v:1:2", "blkrepl::1:2", "blkrepl:v:1:2:3"] {
            assert_eq!(strange.parse::<Identity>(), Err(()), "{strange}");
        }
    }

    #[test]
    fn a_device_node_is_named_as_the_kernel_names_it() {
        assert_eq!(parse_node("/dev/nbd0"), Ok(0));
        assert_eq!(parse_node("/dev/nbd15"), Ok(15));
        for strange in
            ["nbd0", "/dev/nbd", "/dev/nbd01", "/dev/nbd+1", "/dev/nbd1p1", "/dev/sda", "/dev/nbd99999999999"]
        {
            assert!(parse_node(strange).unwrap_err().contains("/dev/nbd0"), "{strange}");
        }
    }

    #[test]
    fn a_device_is_swapped_to_only_if_it_is_itself() {
        let swaps = "Filename\t\tType\t\tSize\n/dev/nbd10   partition\t100\n/dev/nbd2p1 partition\t100\n/nbd3 file 1\n";
        assert_eq!(["nbd10", "nbd2p1"].map(|name| is_swapped_to(swaps, name)), [true, true]);
        for other in ["nbd1", "nbd2", "nbd3", "Filename", ""] {
            assert!(!is_swapped_to(swaps, other), "{other}");
        }
    }
}
