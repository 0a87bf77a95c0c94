//! The kernel's NBD client, driven over generic netlink (family `nbd`, `linux/nbd-netlink.h`).
//!
//! A device that was made so belongs to no process: it lives on its sockets, which the kernel holds, until it is
//! disconnected. Never does: negotiating, or deciding when a socket is to be replaced.
//!
//! What is known of it, and what follows (Linux 6.1, `drivers/block/nbd.c`):
//! - A request that was sent and not answered stays with its socket when that dies. Only the block layer's timer
//!   takes it back ([`REPLAY_AFTER`]) and sends it again; a request that was not sent yet waits and goes on at
//!   once.
//! - With one socket and a time-out of 0 that timer kills no socket: a slow request is left alone, and one whose
//!   socket was replaced is sent again.
//! - With several sockets it gives up the socket of a slow request, and sends it again on another one at once,
//!   while the first copy may still arrive: so a device has one (docs/decisions/map.md).
//! - Without a dead-connection time-out all requests fail as soon as no socket is left.
//! - A reconfiguration takes the place of a dead socket; it leaves what it is given if there is none, and says nothing.
//! - Death of a socket is told once, with the device's number only, and by a work item: perhaps after a
//!   reconfiguration.
//! - A device that was made by ioctl (as old releases of `nbd-client` do) cannot be driven by netlink, nor the
//!   other way round.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use super::device::{self, Identity};
use super::netlink::{Attributes, Family, number};

/// Time after which a request is looked at that was not answered. The block layer looks about once a second.
const REPLAY_AFTER: Duration = Duration::from_millis(500);
/// Longest request that the block layer makes of smaller ones; the kernel's own setting is 128 KiB.
const REQUEST_KIB_MAX: u32 = 1024;
/// "For ever", as long as the kernel can count.
const DEAD_LIMIT_NONE: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// Longest time that udev may take to name a new device.
const NAMES_LIMIT: Duration = Duration::from_secs(10);

const FAMILY: &str = "nbd";
const FAMILY_VERSION: u8 = 1;
const GROUP: &str = "nbd_mc_group";
const CONNECT: u8 = 1;
const DISCONNECT: u8 = 2;
const RECONFIGURE: u8 = 3;
const LINK_DEAD: u8 = 4;
const INDEX: u16 = 1;
const SIZE_BYTES: u16 = 2;
const BLOCK_SIZE_BYTES: u16 = 3;
const TIMEOUT: u16 = 4;
const SERVER_FLAGS: u16 = 5;
const SOCKETS: u16 = 7;
const DEAD_CONN_TIMEOUT: u16 = 8;
const BACKEND_IDENTIFIER: u16 = 10;
const SOCK_ITEM: u16 = 1;
const SOCK_FD: u16 = 1;

/// What a new device is to be.
#[derive(Clone, Debug)]
pub struct Shape {
    /// What it shows, and to whom its requests belong.
    pub identity: Identity,
    /// Bytes.
    pub size: u64,
    /// Logical and physical block size, bytes.
    pub block_size: u32,
    /// Transmission flags of the export.
    pub flags: u16,
    /// How long requests wait for a connection before they fail; `None`: for ever.
    pub give_up_after: Option<Duration>,
}

/// The kernel's NBD client.
#[derive(Debug)]
pub struct KernelNbd {
    requests: Family,
    /// Hears of dead connections. Where it cannot be had they show in what does not go on.
    events: Option<Family>,
}

impl KernelNbd {
    /// Finds it; loads its module if need be.
    ///
    /// # Errors
    /// Says what is missing, and how to do without.
    pub fn open() -> Result<Self> {
        let requests = match Family::open(FAMILY, FAMILY_VERSION) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                load_module();
                Family::open(FAMILY, FAMILY_VERSION)
            }
            other => other,
        };
        let requests = requests.map_err(|error| {
            anyhow!(
                "this kernel has no NBD client ({error}): load its module (modprobe nbd) or install a kernel that \
                 has it; without it use nbdfuse and losetup, see \"Without the kernel's NBD\" in docs/map.md"
            )
        })?;
        let events = requests.listen(GROUP).context("hear of dead NBD connections")?;
        Ok(Self { requests, events })
    }

    /// Makes a device on this connection: number `index`, or one that is free. Returns its number.
    ///
    /// # Errors
    /// The kernel's.
    pub fn connect(&mut self, index: Option<u32>, shape: &Shape, socket: &OwnedFd) -> Result<u32> {
        let give_up = shape.give_up_after.unwrap_or(DEAD_LIMIT_NONE).as_secs();
        let attributes = index.map_or_else(Attributes::default, |i| Attributes::default().u32(INDEX, i));
        let attributes = attributes
            .u64(SIZE_BYTES, shape.size)
            .u64(BLOCK_SIZE_BYTES, shape.block_size.into())
            .u64(TIMEOUT, 0)
            .u64(DEAD_CONN_TIMEOUT, give_up)
            .u64(SERVER_FLAGS, shape.flags.into())
            .nest(SOCKETS, &nest_socket(socket))
            .string(BACKEND_IDENTIFIER, &shape.identity.to_string());
        let answer = self.requests.ask(CONNECT, &attributes).map_err(|error| refused(index, &error))?;
        let index = answer.and_then(|answer| number(&answer, INDEX));
        let index = index.context("the kernel made an NBD device and does not say which")?;
        if device::identity(index).ok().flatten().as_ref() != Some(&shape.identity) {
            let _given_back = self.disconnect(index);
            bail!("this kernel's NBD devices do not say what they show (Linux 5.14 or later is needed)");
        }
        tune(index);
        wait_for_names();
        Ok(index)
    }

    /// Puts a connection in the place of the dead one, and sets the size. If that one lives, nothing changes.
    ///
    /// # Errors
    /// The kernel's: the device is gone, or shows something else.
    pub fn reconfigure(
        &mut self,
        index: u32,
        identity: &Identity,
        resize: Option<(u64, u32)>,
        socket: &OwnedFd,
    ) -> io::Result<()> {
        let mut attributes = Attributes::default()
            .u32(INDEX, index)
            .string(BACKEND_IDENTIFIER, &identity.to_string())
            .nest(SOCKETS, &nest_socket(socket));
        if let Some((size, block_size)) = resize {
            attributes = attributes.u64(SIZE_BYTES, size).u64(BLOCK_SIZE_BYTES, block_size.into());
        }
        self.requests.ask(RECONFIGURE, &attributes).map(drop)
    }

    /// Ends a device. What it has in flight fails.
    ///
    /// # Errors
    /// The kernel's.
    pub fn disconnect(&mut self, index: u32) -> io::Result<()> {
        self.requests.ask(DISCONNECT, &Attributes::default().u32(INDEX, index)).map(drop)
    }

    /// Waits for so long, or until a connection of the device has died; says whether one has.
    ///
    /// # Errors
    /// The kernel's.
    pub fn wait_dead(&mut self, index: u32, limit: Duration) -> io::Result<bool> {
        let Some(events) = &mut self.events else {
            std::thread::sleep(limit);
            return Ok(false);
        };
        let end = Instant::now() + limit;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            match events.hear(left) {
                Ok(told) => {
                    if told.iter().any(|(c, what)| *c == LINK_DEAD && number(what, INDEX) == Some(index)) {
                        return Ok(true);
                    }
                }
                // Something was not heard: it may have been that.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => return Ok(true),
                Err(error) => return Err(error),
            }
            if left.is_zero() {
                return Ok(false);
            }
        }
    }
}

fn nest_socket(socket: &OwnedFd) -> Attributes {
    let fd = u32::try_from(socket.as_raw_fd()).expect("an open descriptor is not negative");
    Attributes::default().nest(SOCK_ITEM, &Attributes::default().u32(SOCK_FD, fd))
}

fn refused(index: Option<u32>, error: &io::Error) -> anyhow::Error {
    match (index, error.raw_os_error()) {
        (Some(index), Some(libc::EBUSY)) => {
            anyhow!("/dev/nbd{index} is in use; name another one, or none and the kernel chooses")
        }
        (_, Some(libc::EPERM | libc::EACCES)) => anyhow!("the kernel lets only root map a device"),
        (Some(index), Some(libc::EINVAL)) => {
            anyhow!("the kernel makes no /dev/nbd{index} ({error}); its log may say why")
        }
        _ => anyhow!("the kernel makes no NBD device: {error}; its log may say why"),
    }
}

/// Failure shows in what is tried next.
fn load_module() {
    match Command::new("modprobe").arg("nbd").output() {
        Ok(done) if done.status.success() => {}
        Ok(done) => tracing::debug!("modprobe nbd: {}", String::from_utf8_lossy(&done.stderr).trim()),
        Err(error) => tracing::debug!("cannot run modprobe: {error}"),
    }
}

/// Settings that netlink has no attribute for, unless they were made. Without them the device works, and is slower.
pub fn tune(index: u32) {
    let last = ("queue/io_timeout", REPLAY_AFTER.as_millis().to_string());
    let is_set = |(name, value): &(&str, String)| {
        std::fs::read_to_string(device::sysfs(index).join(name)).is_ok_and(|text| text.trim() == value)
    };
    if is_set(&last) {
        return;
    }
    for (name, value) in [
        ("queue/max_sectors_kb", REQUEST_KIB_MAX.to_string()),
        // What stands in `backend` was not there yet when the kernel told udev of the device.
        ("uevent", "change".to_owned()),
        last,
    ] {
        let path = device::sysfs(index).join(name);
        if let Err(error) = std::fs::write(&path, &value) {
            tracing::warn!("cannot write {value} to {}: {error}", path.display());
        }
    }
}

/// Waits until udev has given the device its names, so that whoever hears that it is there finds it by them.
fn wait_for_names() {
    if !Path::new("/run/udev/control").exists() {
        return;
    }
    let limit = format!("--timeout={}", NAMES_LIMIT.as_secs());
    match Command::new("udevadm").args(["settle", &limit]).output() {
        Ok(done) if done.status.success() => {}
        Ok(done) => tracing::warn!("udev is not done with the device yet: {}", done.status),
        Err(error) => tracing::debug!("cannot run udevadm: {error}"),
    }
}
