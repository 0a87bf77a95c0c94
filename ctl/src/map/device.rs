//! The kernel's NBD devices that show volumes, as sysfs has them.
//!
//! The kernel is the only record of what is mapped: each device bears an [`Identity`] that outlives every process.
//! Reads sysfs and procfs only; never changes a device.

use std::fmt;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Result, anyhow, bail};
use rustix::fs::OFlags;

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
        let hex = |text| u128::from_str_radix(text, 16).map_err(drop);
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
pub fn identity(index: u32) -> Option<Identity> {
    fs::read_to_string(sysfs(index).join("backend")).ok()?.trim().parse().ok()
}

/// What sysfs says of a device, if it shows a volume.
pub fn mapped(index: u32) -> Option<Mapped> {
    let number = |name: &str| fs::read_to_string(sysfs(index).join(name)).ok()?.trim().parse::<u64>().ok();
    let block_size = u32::try_from(number("queue/logical_block_size")?).ok()?;
    Some(Mapped { index, identity: identity(index)?, size: number("size")? * SECTOR, block_size })
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
    Ok(indexes.into_iter().filter_map(mapped).collect())
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

/// Who uses a device; `None` if nobody does, as far as this machine can tell.
pub fn user(device: &Mapped) -> Option<String> {
    let node = device.node();
    // Fails while a file system is mounted from it, or something is built on it.
    let exclusive = i32::try_from(OFlags::EXCL.bits()).unwrap_or_default();
    match fs::OpenOptions::new().read(true).custom_flags(exclusive).open(&node) {
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Some(mount_of(&node).map_or_else(
            || "something is built on it (see lsblk)".to_owned(),
            |at| format!("it is mounted at {at}"),
        )),
        _ => opener(&node),
    }
}

fn mount_of(node: &Path) -> Option<String> {
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    let mut mounts = mounts.lines().filter_map(|line| line.split_once(' '));
    let (_, rest) = mounts.find(|(source, _)| fs::canonicalize(source).is_ok_and(|source| source == node))?;
    Some(rest.split(' ').next()?.to_owned())
}

/// A process that has the device open.
fn opener(node: &Path) -> Option<String> {
    let device = fs::metadata(node).ok().filter(|m| m.file_type().is_block_device())?.rdev();
    let me = std::process::id().to_string();
    let is_it =
        |fd: &Path| fs::metadata(fd).is_ok_and(|m| m.file_type().is_block_device() && m.rdev() == device);
    for process in fs::read_dir("/proc").ok()?.filter_map(Result::ok) {
        let pid = process.file_name().to_string_lossy().into_owned();
        if pid == me || !pid.bytes().all(|b| b.is_ascii_digit()) {
            continue;
        }
        let Ok(fds) = fs::read_dir(process.path().join("fd")) else { continue };
        if fds.filter_map(Result::ok).any(|fd| is_it(&fd.path())) {
            let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
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
}
