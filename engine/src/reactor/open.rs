//! Makes, opens, locks and checks the files of one replica. Blocking; done before its thread starts.
//!
//! The lock comes before anything else [R7]: it is an flock on the very open files that the ring will
//! use, and the kernel keeps those open until the last request on them is over. So whoever gets the lock
//! knows that every write of a predecessor, killed or not, has ended.
//!
//! The data object's identity is compared with what the metadata recorded [R15]. If another file or
//! device stands under old metadata, the image that is returned says that nothing is known of its
//! content: everything is copied.
//!
//! Never does: repairing or overwriting anything that may hold data. A file that does not fit is an
//! error that names it, what was found, what was expected, and the next step.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, FileType, FlockOperation, OFlags, StatxFlags, XattrFlags};
use thiserror::Error;

use crate::durable;
use crate::meta::{
    DataIdentity, Image, ImageError, SUPERBLOCK_LEN, Superblock, SuperblockCopy, SuperblockError, read_pair,
};
use crate::mutation::{Mutation, mutated};
use crate::types::{ClusterId, Geometry, NodeId, ReplicaSlot, VolumeId};
use crate::wire::BaseContent;

use super::buffers::{ALIGN, Buffers};

/// How long [`open`] and [`create`] usually wait for a lock: requests of a killed predecessor may take so long.
pub const LOCK_WAIT_DEFAULT: Duration = Duration::from_secs(3);
/// Extended attribute of a data file that holds its random tag.
const TAG_NAME: &str = "user.blkrepl.id";
/// Bytes of the tag.
const TAG_LEN: usize = 16;

/// Where the files of a replica are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumePaths {
    /// The data file, or a block device.
    pub data: PathBuf,
    /// The metadata file.
    pub meta: PathBuf,
}

/// What the files of a replica must belong to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expected {
    /// The cluster; `None` if that is judged elsewhere (after a forced recovery the cluster has a new id).
    pub cluster: Option<ClusterId>,
    /// The volume.
    pub volume: VolumeId,
    /// The node.
    pub node: NodeId,
    /// Sizes, as committed.
    pub geometry: Geometry,
    /// Slots of the other replicas: for each there is a dirty bitmap.
    pub other_slots: Vec<ReplicaSlot>,
}

/// An open file of a replica.
#[derive(Debug)]
pub(super) struct OpenFile {
    pub(super) fd: OwnedFd,
    pub(super) path: PathBuf,
    /// O_DIRECT is on.
    pub(super) direct: bool,
    /// On a file system that keeps its files in memory (tmpfs).
    pub(super) in_memory: bool,
}

/// The open, locked files of a replica, for its reactor.
#[derive(Debug)]
pub struct VolumeFiles {
    pub(super) data: OpenFile,
    pub(super) meta: OpenFile,
    pub(super) geometry: Geometry,
}

impl VolumeFiles {
    /// True if block content goes past the page cache.
    #[must_use]
    pub fn is_direct(&self) -> bool {
        self.data.direct
    }
}

/// A replica's files and what their metadata says.
#[derive(Debug)]
pub struct OpenVolume {
    /// For [`spawn`](super::spawn).
    pub files: VolumeFiles,
    /// For the core. If `identity_changed`, it already says that the content is unknown (base unknown, no
    /// member, not clean, the new identity); the core makes that durable with its first superblock.
    pub image: Image,
    /// The data object is not the one that the metadata was written for [R15].
    pub identity_changed: bool,
}

/// Which file of a replica is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The data file or device.
    Data,
    /// The metadata file.
    Meta,
}

impl std::fmt::Display for Part {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Data => "data file",
            Self::Meta => "metadata file",
        })
    }
}

/// Why the files of a replica cannot be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum OpenError {
    /// A file is not there.
    #[error(
        "{part} {path} does not exist. If it was moved, put it back; if it is lost, move the other file of \
         this replica away too: the replica is then made anew and copies everything"
    )]
    Missing {
        /// Which.
        part: Part,
        /// Its path.
        path: PathBuf,
    },
    /// A file that is to be made is already there.
    #[error(
        "{part} {path} already exists and is not empty; it is not overwritten. Move it away if it is not \
         needed, or choose another path in the node config"
    )]
    Exists {
        /// Which.
        part: Part,
        /// Its path.
        path: PathBuf,
    },
    /// Another process has the lock [R7].
    #[error(
        "{part} {path} is in use by another process (a second blkrepl on the same directory, or requests of \
         a killed one that have not ended). Find it with `fuser -v {path}` and stop it, then try again"
    )]
    Locked {
        /// Which.
        part: Part,
        /// Its path.
        path: PathBuf,
    },
    /// Neither a regular file nor (for data) a block device.
    #[error("{part} {path} is not a regular file{}; correct its path in the node config",
        if *part == Part::Data { " or block device" } else { "" })]
    NotAFile {
        /// Which.
        part: Part,
        /// Its path.
        path: PathBuf,
    },
    /// The data file is shorter than the volume.
    #[error(
        "data file {path} was truncated: it has {found} bytes, the volume {expected}. If another replica is \
         in sync, move this file and its metadata away: the replica is then made anew and copies everything"
    )]
    Truncated {
        /// Its path.
        path: PathBuf,
        /// Bytes there are.
        found: u64,
        /// Bytes there must be.
        expected: u64,
    },
    /// The data file is longer than the volume.
    #[error(
        "data file {path} has {found} bytes, the volume {expected}: it belongs to something else or was \
         changed. Correct the path in the node config, or restore the file's size"
    )]
    TooLong {
        /// Its path.
        path: PathBuf,
        /// Bytes there are.
        found: u64,
        /// Bytes there must be.
        expected: u64,
    },
    /// The metadata is of another volume, node, cluster or size.
    #[error(
        "metadata file {path} belongs to {what} {found}, expected is {expected}. Correct the path in the \
         node config; nothing was changed"
    )]
    Foreign {
        /// Its path.
        path: PathBuf,
        /// What differs.
        what: &'static str,
        /// As the superblock says.
        found: String,
        /// As it must be.
        expected: String,
    },
    /// The superblock cannot be used.
    #[error("metadata file {path}: {source}")]
    Superblock {
        /// Its path.
        path: PathBuf,
        /// What is wrong.
        source: SuperblockError,
    },
    /// The system refused something.
    #[error("{action} {path}: {source}")]
    Io {
        /// What was being done.
        action: &'static str,
        /// With which file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> OpenError {
    move |source| OpenError::Io { action, path: path.to_owned(), source }
}

/// Opens, locks and checks the files of a replica, and reads its metadata. Waits up to `lock_wait` for
/// the locks.
///
/// # Errors
/// [`OpenError`]; nothing was changed then.
pub fn open(paths: &VolumePaths, expected: &Expected, lock_wait: Duration) -> Result<OpenVolume, OpenError> {
    let meta = open_existing(&paths.meta, Part::Meta)?;
    lock(&meta, &paths.meta, Part::Meta, lock_wait)?;
    let data = open_existing(&paths.data, Part::Data)?;
    lock(&data, &paths.data, Part::Data, lock_wait)?;
    // While this waited for a lock, whoever had it may have removed the file.
    for (file, path, part) in [(&meta, &paths.meta, Part::Meta), (&data, &paths.data, Part::Data)] {
        if !is_at(file, path) {
            return Err(OpenError::Missing { part, path: path.clone() });
        }
    }
    let mut read_at = |offset: u64, bytes: &mut [u8]| read_or_zero(&meta, offset, bytes);
    let mut image = Image::read(&mut read_at, &expected.other_slots).map_err(|error| match error {
        ImageError::Superblock(source) => OpenError::Superblock { path: paths.meta.clone(), source },
        ImageError::Read { source, .. } => failed("reading", &paths.meta)(source),
    })?;
    check_belongs(&image.superblock, expected, &paths.meta)?;
    let found = check_size(&data, &paths.data, expected.geometry.size())?;
    let meta_len = meta.metadata().map_err(failed("examining", &paths.meta))?.len();
    if meta_len < image.layout().file_len() {
        image.notes.push(format!(
            "metadata file {} was cut off at byte {meta_len}: what is missing reads all-set",
            paths.meta.display()
        ));
    }
    let identity = identity_of(&data, found).map_err(failed("examining", &paths.data))?;
    let identity_changed = identity != image.superblock.identity;
    if identity_changed && !mutated(Mutation::R15) {
        forget_content(&mut image, identity, &paths.data);
    }
    let files = VolumeFiles {
        data: finish(data, &paths.data)?,
        meta: finish(meta, &paths.meta)?,
        geometry: expected.geometry,
    };
    Ok(OpenVolume { files, image, identity_changed })
}

/// What the metadata of a replica says of it, whatever it belongs to. Nothing is locked: somebody may write it.
///
/// # Errors
/// There is none, or it cannot be used.
pub fn superblock_of(paths: &VolumePaths) -> Result<Superblock, OpenError> {
    let meta = open_existing(&paths.meta, Part::Meta)?;
    let mut copies = [SuperblockCopy::A, SuperblockCopy::B].map(|copy| (copy, [0; SUPERBLOCK_LEN]));
    for (copy, bytes) in &mut copies {
        read_or_zero(&meta, copy.offset(), bytes).map_err(failed("reading", &paths.meta))?;
    }
    let [(_, a), (_, b)] = copies;
    let read = read_pair(&a, &b);
    read.map(|(found, ..)| found).map_err(|source| OpenError::Superblock { path: paths.meta.clone(), source })
}

/// Removes a metadata file whose data file is not there.
///
/// # Errors
/// It is not there, somebody uses it, or it cannot be removed.
pub fn remove_lone_metadata(paths: &VolumePaths, lock_wait: Duration) -> Result<(), OpenError> {
    let meta = open_existing(&paths.meta, Part::Meta)?;
    lock(&meta, &paths.meta, Part::Meta, lock_wait)?;
    if !is_at(&meta, &paths.meta) {
        return Err(OpenError::Missing { part: Part::Meta, path: paths.meta.clone() });
    }
    if paths.data.symlink_metadata().is_ok() {
        return Err(OpenError::Exists { part: Part::Data, path: paths.data.clone() });
    }
    std::fs::remove_file(&paths.meta).map_err(failed("removing", &paths.meta))
}

/// Makes the files of a new replica: a sparse data file (a block device is taken as it is) and its
/// metadata, both durable when this returns. `superblock` gives everything but `identity`, which is set
/// here, and `base`, which becomes unknown on a block device. `others_zero`: all other replicas are known
/// to hold zeroes as this one does, so nobody lacks anything; ignored on a block device.
///
/// May be repeated after it was interrupted. An existing data file is taken over only if no byte of it was
/// ever written.
///
/// # Errors
/// [`OpenError`]; no data was overwritten then.
pub fn create(
    paths: &VolumePaths,
    superblock: Superblock,
    other_slots: &[ReplicaSlot],
    others_zero: bool,
    lock_wait: Duration,
) -> Result<OpenVolume, OpenError> {
    if paths.meta.symlink_metadata().is_ok() {
        return Err(OpenError::Exists { part: Part::Meta, path: paths.meta.clone() });
    }
    // The lock on the file that becomes the metadata file keeps a second creator away.
    let making = durable::with_suffix(&paths.meta, ".new");
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    let meta = options.open(&making).map_err(failed("making", &making))?;
    lock(&meta, &making, Part::Meta, lock_wait)?;
    // Another creator may have finished while this one waited for the lock: what is open here is then the
    // metadata of its replica.
    let mine = is_at(&meta, &making);
    let exists = paths.meta.symlink_metadata().is_ok();
    if mine && exists {
        // It finished before this one made the file anew; the lock keeps everybody else from it.
        std::fs::remove_file(&making).map_err(failed("removing", &making))?;
    }
    if !mine || exists {
        return Err(OpenError::Exists { part: Part::Meta, path: paths.meta.clone() });
    }
    // A second descriptor of the same open file: the lock is kept until what is left has been removed.
    let _lock = meta.try_clone().map_err(failed("keeping open", &making))?;
    let made = create_locked(paths, meta, &making, superblock, other_slots, others_zero, lock_wait);
    if made.is_err() && paths.meta.symlink_metadata().is_err() {
        // On a full disk it is in everybody's way. It holds nothing.
        let removed = std::fs::remove_file(&making);
        tracing::debug!(file = %making.display(), ?removed, "gave up making a replica");
    }
    made
}

fn create_locked(
    paths: &VolumePaths,
    meta: File,
    making: &Path,
    mut superblock: Superblock,
    other_slots: &[ReplicaSlot],
    others_zero: bool,
    lock_wait: Duration,
) -> Result<OpenVolume, OpenError> {
    let geometry = superblock.geometry;
    let data = make_data(&paths.data, geometry.size(), lock_wait)?;
    let size = check_size(&data, &paths.data, geometry.size())?;
    let is_device = is_block_device(&data, &paths.data)?;
    if is_device {
        superblock.base = BaseContent::Unknown;
    }
    superblock.identity = identity_of(&data, size).map_err(failed("examining", &paths.data))?;
    let mut image = Image::fresh(superblock, other_slots, others_zero && !is_device);
    write_image(&meta, &mut image).map_err(failed("writing", making))?;
    durable::rename(making, &paths.meta).map_err(failed("renaming", making))?;
    let files = VolumeFiles { data: finish(data, &paths.data)?, meta: finish(meta, &paths.meta)?, geometry };
    Ok(OpenVolume { files, image, identity_changed: false })
}

/// The content is not what the metadata describes [R15].
fn forget_content(image: &mut Image, identity: DataIdentity, path: &Path) {
    let superblock = &mut image.superblock;
    superblock.identity = identity;
    superblock.base = BaseContent::Unknown;
    superblock.member = None;
    superblock.clean = None;
    image.notes.push(format!(
        "{} is not the file or device that the metadata was written for: its content counts as unknown and \
         everything is copied",
        path.display()
    ));
}

fn check_belongs(superblock: &Superblock, expected: &Expected, path: &Path) -> Result<(), OpenError> {
    let foreign = |what, found: String, expected: String| {
        Err(OpenError::Foreign { path: path.to_owned(), what, found, expected })
    };
    if superblock.volume != expected.volume {
        return foreign("volume", superblock.volume.to_string(), expected.volume.to_string());
    }
    if superblock.node != expected.node {
        return foreign("the replica on", superblock.node.to_string(), expected.node.to_string());
    }
    if let Some(cluster) = expected.cluster.filter(|cluster| *cluster != superblock.cluster) {
        return foreign("cluster", superblock.cluster.to_string(), cluster.to_string());
    }
    if superblock.geometry != expected.geometry {
        let text = |g: &Geometry| {
            format!("{} bytes (blocks of {}, regions of {})", g.size(), g.block_size(), g.region_size())
        };
        return foreign("a volume of", text(&superblock.geometry), text(&expected.geometry));
    }
    Ok(())
}

fn open_existing(path: &Path, part: Part) -> Result<File, OpenError> {
    let kind = match std::fs::metadata(path) {
        Ok(metadata) => metadata.file_type(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(OpenError::Missing { part, path: path.to_owned() });
        }
        Err(error) => return Err(failed("examining", path)(error)),
    };
    let is_device = part == Part::Data && kind.is_block_device();
    if !kind.is_file() && !is_device {
        return Err(OpenError::NotAFile { part, path: path.to_owned() });
    }
    // O_EXCL on a block device keeps it from being mounted meanwhile, and refuses one that is.
    let exclusive = if is_device { OFlags::EXCL } else { OFlags::empty() };
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(exclusive.bits().cast_signed());
    match options.open(path) {
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
            Err(OpenError::Locked { part, path: path.to_owned() })
        }
        other => other.map_err(failed("opening", path)),
    }
}

/// Takes the exclusive lock [R7].
fn lock(file: &File, path: &Path, part: Part, wait: Duration) -> Result<(), OpenError> {
    if mutated(Mutation::R7) {
        return Ok(());
    }
    let end = Instant::now() + wait;
    loop {
        match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(()),
            Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) if Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(rustix::io::Errno::WOULDBLOCK) => {
                return Err(OpenError::Locked { part, path: path.to_owned() });
            }
            Err(error) => return Err(failed("locking", path)(error.into())),
        }
    }
}

/// True if the open file is still the one at this path.
fn is_at(file: &File, path: &Path) -> bool {
    let key = |metadata: std::fs::Metadata| (metadata.dev(), metadata.ino());
    match (file.metadata(), std::fs::metadata(path)) {
        (Ok(open), Ok(there)) => key(open) == key(there),
        _ => false,
    }
}

/// Makes the data file (or opens the device), locked, of the right size, tagged and durable.
fn make_data(path: &Path, size: u64, lock_wait: Duration) -> Result<File, OpenError> {
    match std::fs::metadata(path) {
        Ok(metadata) if metadata.file_type().is_block_device() => {
            let device = open_existing(path, Part::Data)?;
            lock(&device, path, Part::Data, lock_wait)?;
            return Ok(device);
        }
        // Left over from a create that was interrupted: nothing was ever written to it.
        Ok(metadata) if metadata.is_file() && metadata.blocks() == 0 => {}
        Ok(_) => return Err(OpenError::Exists { part: Part::Data, path: path.to_owned() }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed("examining", path)(error)),
    }
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    let file = options.open(path).map_err(failed("making", path))?;
    lock(&file, path, Part::Data, lock_wait)?;
    if !is_at(&file, path) {
        return Err(OpenError::Missing { part: Part::Data, path: path.to_owned() });
    }
    file.set_len(size).map_err(failed("sizing", path))?;
    let tag = random_tag().map_err(failed("reading", Path::new("/dev/urandom")))?;
    if let Err(error) = rustix::fs::fsetxattr(&file, TAG_NAME, &tag, XattrFlags::empty()) {
        tracing::debug!(file = %path.display(), %error, "no extended attributes here: known by its inode");
    }
    file.sync_all().map_err(failed("flushing", path))?;
    durable::sync_directory_of(path).map_err(failed("flushing the directory of", path))?;
    Ok(file)
}

/// Writes everything and flushes it; the file becomes visible by a rename only after this.
fn write_image(file: &File, image: &mut Image) -> io::Result<()> {
    file.set_len(0)?;
    file.set_len(image.layout().file_len())?;
    for (offset, bytes) in image.encode_all() {
        file.write_all_at(&bytes, offset)?;
    }
    file.sync_all()
}

fn random_tag() -> io::Result<[u8; TAG_LEN]> {
    let mut tag = [0; TAG_LEN];
    io::Read::read_exact(&mut File::open("/dev/urandom")?, &mut tag)?;
    Ok(tag)
}

/// Reads, with zeroes for what lies beyond the end.
fn read_or_zero(file: &File, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        match file.read_at(&mut bytes[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    bytes[done..].fill(0);
    Ok(())
}

fn is_block_device(file: &File, path: &Path) -> Result<bool, OpenError> {
    Ok(file.metadata().map_err(failed("examining", path))?.file_type().is_block_device())
}

/// The size of the data object in bytes, if it fits the volume. A device may be larger.
fn check_size(data: &File, path: &Path, expected: u64) -> Result<u64, OpenError> {
    let is_device = is_block_device(data, path)?;
    let found = io::Seek::seek(&mut &*data, io::SeekFrom::End(0)).map_err(failed("measuring", path))?;
    if found < expected {
        return Err(OpenError::Truncated { path: path.to_owned(), found, expected });
    }
    if found > expected && !is_device {
        return Err(OpenError::TooLong { path: path.to_owned(), found, expected });
    }
    Ok(found)
}

/// What tells this data object from every other [R15]: of a file its tag (where the file system keeps
/// extended attributes), inode number and time of birth, so that neither a copy that took the tag along
/// nor a reused inode passes for it; of a device its number and size. The first byte is the kind.
fn identity_of(data: &File, size: u64) -> io::Result<DataIdentity> {
    let metadata = data.metadata()?;
    let mut hasher = blake3::Hasher::new();
    let kind = if metadata.file_type().is_block_device() {
        hasher.update(&metadata.rdev().to_le_bytes());
        hasher.update(&size.to_le_bytes());
        3
    } else {
        let flags = StatxFlags::INO | StatxFlags::BTIME;
        let status = rustix::fs::statx(data.as_fd(), "", AtFlags::EMPTY_PATH, flags)?;
        hasher.update(&metadata.ino().to_le_bytes());
        if status.stx_mask & StatxFlags::BTIME.bits() != 0 {
            hasher.update(&status.stx_btime.tv_sec.to_le_bytes());
            hasher.update(&status.stx_btime.tv_nsec.to_le_bytes());
        }
        let mut tag = [0_u8; TAG_LEN];
        match rustix::fs::fgetxattr(data, TAG_NAME, &mut tag[..]) {
            Ok(TAG_LEN) => {
                hasher.update(&tag);
                1
            }
            _ => 2,
        }
    };
    let mut identity = [0; 32];
    identity[0] = kind;
    identity[1..].copy_from_slice(&hasher.finalize().as_bytes()[..31]);
    Ok(DataIdentity(identity))
}

/// Switches to O_DIRECT if that works, and makes the file ready for the ring.
fn finish(file: File, path: &Path) -> Result<OpenFile, OpenError> {
    let fd = OwnedFd::from(file);
    let direct = try_direct(&fd).map_err(failed("switching to O_DIRECT", path))?;
    if !direct {
        tracing::warn!(
            file = %path.display(),
            "the file system refuses O_DIRECT: going on with buffered I/O (correct, but slower)"
        );
    }
    let in_memory = run_in_place(&fd).map_err(failed("setting up", path))?;
    Ok(OpenFile { fd, path: path.to_owned(), direct, in_memory })
}

/// Lets the ring carry out requests on a file in memory at once. It does not know that tmpfs never waits for a
/// device and would hand each request to a thread, which costs more than the copy; the flag, which means
/// nothing to a regular file otherwise, makes it try first. Not for other file systems: they may wait. True if it
/// is a file in memory: not a device, whose node lies in such a file system, too.
pub(super) fn run_in_place(fd: &OwnedFd) -> io::Result<bool> {
    let regular = FileType::from_raw_mode(rustix::fs::fstat(fd)?.st_mode).is_file();
    let in_memory = regular && rustix::fs::fstatfs(fd)?.f_type == libc::TMPFS_MAGIC;
    if in_memory {
        let flags = rustix::fs::fcntl_getfl(fd)?;
        rustix::fs::fcntl_setfl(fd, flags | OFlags::NONBLOCK)?;
    }
    Ok(in_memory)
}

/// Sets O_DIRECT and tries an aligned read; unset again if either is refused.
pub(super) fn try_direct(fd: &OwnedFd) -> io::Result<bool> {
    let flags = rustix::fs::fcntl_getfl(fd)?;
    match rustix::fs::fcntl_setfl(fd, flags | OFlags::DIRECT) {
        Ok(()) => {}
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::OPNOTSUPP) => return Ok(false),
        Err(error) => return Err(error.into()),
    }
    let mut buffers = Buffers::new(0);
    let buf = buffers.alloc(ALIGN);
    let tried = rustix::io::pread(fd, buffers.bytes_mut(buf), 0);
    match tried {
        Ok(_) => Ok(true),
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::OPNOTSUPP) => {
            rustix::fs::fcntl_setfl(fd, flags)?;
            Ok(false)
        }
        Err(error) => Err(error.into()),
    }
}
