//! The files of this node's replicas: when they are opened, when they are made, when removed.
//!
//! Files are made only where none of the two exists: for a replica that is new, or whose files somebody
//! moved away. The first member of a new volume gets its files *before* the volume is committed, with its
//! membership recorded in them, so that a crash right after the commit leaves nothing that only an
//! operator could force. A file that exists is never overwritten here; [`remove`] is for files that an
//! operator gave up, [`remove_first`] for those that never belonged to a committed volume. Everything here blocks.

use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use blkrepl_engine::durable;
use blkrepl_engine::meta::Superblock;
use blkrepl_engine::reactor::{
    self, Expected, LOCK_WAIT_DEFAULT, OpenVolume, ReactorError, ReactorOptions, VolumeHandle, VolumePaths,
};
use blkrepl_engine::replica::{Boot, Replica};
use blkrepl_engine::types::{ClusterId, ConfigView, Epoch, Member, Nanos, NodeId, Reign, ReplicaSlot};
use blkrepl_engine::wire::BaseContent;
use thiserror::Error;

use super::node::Hooks;
use crate::config::NodeConfig;
use crate::ops::NewVolume;

/// Why a replica's files cannot be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The engine refuses them; it names file, found, expected and the next step.
    #[error(transparent)]
    Engine(#[from] reactor::OpenError),
    /// Files are where none must be.
    #[error("{0} exists and may hold data; move it away, or add --discard-data to remove it")]
    Exists(PathBuf),
    /// A file cannot be removed.
    #[error("cannot remove {path}: {source}; remove it by hand and try again")]
    Remove {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A directory cannot be made.
    #[error("cannot make the directory {path}: {source}")]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The volume is not one that this node holds.
    #[error("this node holds no replica of the volume by the committed config")]
    NotHere,
}

/// Where the files of one replica are.
#[derive(Clone, Debug)]
pub struct Place {
    name: String,
    paths: VolumePaths,
}

impl Place {
    /// The place of a volume's replica on this node.
    pub fn of(config: &NodeConfig, volume: &str) -> Self {
        let (data, meta) = config.volume_paths(volume);
        Self { name: volume.to_string(), paths: VolumePaths { data, meta } }
    }

    /// The files.
    pub fn paths(&self) -> &VolumePaths {
        &self.paths
    }
}

/// What the files must belong to.
pub struct Wanted<'a> {
    /// The committed config.
    pub view: &'a ConfigView,
    /// This node and this run.
    pub me: Member,
    /// Boot id of the operating system.
    pub os_boot: u128,
}

/// Files that are open and locked.
pub struct Opened {
    name: String,
    volume: OpenVolume,
    /// What people should know about how they were found.
    pub notes: Vec<String>,
    /// What clients are told of the data object.
    pub nature: Nature,
}

/// What lies under a volume's data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Nature {
    /// A disk that turns.
    pub rotational: bool,
    /// Something that makes holes where zeroes are written.
    pub makes_holes: bool,
}

impl Nature {
    fn of(data: &Path) -> Self {
        Self { rotational: is_rotational(data), makes_holes: reactor::makes_holes(data) }
    }
}

/// The disk under a file, or the one that it is, turns: so the kernel says, of a partition by the disk that has it. Not
/// known is no.
fn is_rotational(data: &Path) -> bool {
    let Ok(meta) = std::fs::metadata(data) else { return false };
    let device = if meta.file_type().is_block_device() { meta.rdev() } else { meta.dev() };
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    ["queue", "../queue"].iter().any(|queue| {
        let path = format!("/sys/dev/block/{major}:{minor}/{queue}/rotational");
        std::fs::read_to_string(path).is_ok_and(|text| text.trim() == "1")
    })
}

/// Opens the files; makes them if neither exists.
///
/// # Errors
/// [`OpenError`].
pub fn open_or_create(place: &Place, wanted: &Wanted<'_>) -> Result<Opened, OpenError> {
    let there = |path: &Path| path.symlink_metadata().is_ok();
    let data_is_device = is_block_device(&place.paths.data);
    if !there(&place.paths.meta) && (!there(&place.paths.data) || data_is_device) {
        return create(place, wanted);
    }
    let slots = other_slots(wanted)?;
    let expected = Expected {
        // Judged by the lineage: a forced recovery keeps the content and changes the cluster's id.
        cluster: None,
        volume: wanted.view.volume,
        node: wanted.me.node,
        geometry: wanted.view.geometry,
        other_slots: slots.1,
    };
    match reactor::open(&place.paths, &expected, LOCK_WAIT_DEFAULT) {
        // What is odd about the metadata is told by the core, as events.
        Ok(volume) => Ok(Opened {
            name: place.name.clone(),
            volume,
            notes: Vec::new(),
            nature: Nature::of(&place.paths.data),
        }),
        // A making of the files that was interrupted: the metadata file comes last, and nothing was ever
        // written to the data file. The engine refuses to take over a data file with content.
        Err(reactor::OpenError::Missing { part: reactor::Part::Meta, .. })
            if is_unwritten(&place.paths.data) =>
        {
            create(place, wanted)
        }
        Err(error) => Err(error.into()),
    }
}

/// Makes the files of a replica that is no member: all zeroes, or a device of which nothing is known.
///
/// # Errors
/// [`OpenError`].
pub fn create(place: &Place, wanted: &Wanted<'_>) -> Result<Opened, OpenError> {
    let (slot, others) = other_slots(wanted)?;
    let superblock = Superblock {
        cluster: wanted.view.cluster,
        volume: wanted.view.volume,
        node: wanted.me.node,
        slot,
        geometry: wanted.view.geometry,
        seq: 0,
        epoch: Epoch(0),
        reign: Reign(0),
        lineage: wanted.view.lineage,
        member: None,
        current: wanted.me.incarnation,
        chain: Vec::new(),
        os_boot: wanted.os_boot,
        inconsistent: None,
        base: BaseContent::Zero,
        identity: Default::default(),
        clean: None,
    };
    make_directories(place)?;
    // It holds no write that another replica could lack.
    let volume = reactor::create(&place.paths, superblock, &others, true, LOCK_WAIT_DEFAULT)?;
    let mut notes = vec![format!("new files for the replica: {}", place.paths.data.display())];
    let lost = wanted.view.replica(wanted.me.node).is_some_and(|r| r.last_member.is_some());
    if lost {
        notes
            .push("this node held a replica before and its files are gone: everything is copied".to_string());
    }
    Ok(Opened { name: place.name.clone(), volume, notes, nature: Nature::of(&place.paths.data) })
}

/// Makes the files of a volume that is about to be created, with `me` as its first member, and closes them
/// again.
///
/// # Errors
/// [`OpenError`].
pub fn create_first(
    place: &Place,
    new: &NewVolume,
    cluster: ClusterId,
    me: Member,
    os_boot: u128,
) -> Result<(), OpenError> {
    // Slots as the creation gives them out: in the order of the nodes.
    let slots = (0u8..).map(ReplicaSlot).zip(&new.replicas);
    let slot = slots.clone().find(|(_, n)| **n == me.node).ok_or(OpenError::NotHere)?.0;
    let others: Vec<ReplicaSlot> = slots.filter(|(_, n)| **n != me.node).map(|(s, _)| s).collect();
    let superblock = Superblock {
        cluster,
        volume: new.id,
        node: me.node,
        slot,
        geometry: new.geometry,
        seq: 0,
        epoch: Epoch(1),
        reign: Reign(1),
        lineage: new.lineage,
        member: Some(me.incarnation),
        current: me.incarnation,
        chain: Vec::new(),
        os_boot,
        inconsistent: None,
        base: BaseContent::Zero,
        identity: Default::default(),
        clean: None,
    };
    make_directories(place)?;
    reactor::create(&place.paths, superblock, &others, true, LOCK_WAIT_DEFAULT)?;
    Ok(())
}

/// Removes the files. A block device is left as it is; without metadata nothing is known of it.
///
/// # Errors
/// [`OpenError::Remove`].
pub fn remove(place: &Place) -> Result<(), OpenError> {
    let mut doomed = vec![&place.paths.meta];
    if !is_block_device(&place.paths.data) {
        doomed.push(&place.paths.data);
    }
    for path in doomed {
        match std::fs::remove_file(path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(OpenError::Remove { path: path.clone(), source });
            }
            _ => {}
        }
    }
    Ok(())
}

/// Removes the files that [`create_first`] made for a volume that will never exist. Files of another volume
/// stay: one of the same name may have been created meanwhile.
///
/// # Errors
/// [`OpenError`].
pub fn remove_first(place: &Place, new: &NewVolume, me: NodeId) -> Result<(), OpenError> {
    let slots = (0u8..).map(ReplicaSlot).zip(&new.replicas);
    let expected = Expected {
        cluster: None,
        volume: new.id,
        node: me,
        geometry: new.geometry,
        other_slots: slots.filter(|(_, n)| **n != me).map(|(s, _)| s).collect(),
    };
    remove_made(place, &expected)
}

/// Removes the files of a replica that is no member of anything.
///
/// # Errors
/// They are not those that are expected, somebody has them open, or they cannot be removed.
pub(super) fn remove_made(place: &Place, expected: &Expected) -> Result<(), OpenError> {
    let open = reactor::open(&place.paths, expected, LOCK_WAIT_DEFAULT)?;
    if open.identity_changed {
        // The metadata is as expected, and this is not what it was written for.
        return Err(OpenError::Exists(place.paths.data.clone()));
    }
    // The metadata goes last: as long as it is there, nobody else makes files at this place.
    if !is_block_device(&place.paths.data) {
        remove_file(&place.paths.data)?;
    }
    remove_file(&place.paths.meta)?;
    drop(open);
    Ok(())
}

fn remove_file(path: &Path) -> Result<(), OpenError> {
    std::fs::remove_file(path).map_err(|source| OpenError::Remove { path: path.to_owned(), source })
}

/// Fails if a file is there.
///
/// # Errors
/// [`OpenError::Exists`].
pub fn check_absent(place: &Place) -> Result<(), OpenError> {
    for path in [&place.paths.data, &place.paths.meta] {
        if path.symlink_metadata().is_ok() && !is_block_device(path) {
            return Err(OpenError::Exists(path.clone()));
        }
    }
    Ok(())
}

/// Starts the reactor. `failed`: why this copy failed when it was open before in this run.
///
/// # Errors
/// [`ReactorError`].
pub fn start(
    opened: Opened,
    me: Member,
    os_boot: u128,
    failed: Option<String>,
    idle_max: Option<Duration>,
    hooks: Box<Hooks>,
) -> Result<VolumeHandle, ReactorError> {
    let Opened { name, volume, .. } = opened;
    let OpenVolume { files, image, identity_changed } = volume;
    let data_replaced = identity_changed;
    let core = move |now: Nanos| Replica::new(Boot { me, os_boot, image, data_replaced, failed, now });
    reactor::spawn(core, files, hooks, ReactorOptions { idle_max, ..ReactorOptions::new(&name) })
}

/// The slot of this node's replica, and those of the others.
fn other_slots(wanted: &Wanted<'_>) -> Result<(ReplicaSlot, Vec<ReplicaSlot>), OpenError> {
    let me = wanted.me.node;
    let slot = wanted.view.slot(me).ok_or(OpenError::NotHere)?;
    let others = wanted.view.replicas.iter().filter(|r| r.node != me).map(|r| r.slot).collect();
    Ok((slot, others))
}

fn make_directories(place: &Place) -> Result<(), OpenError> {
    for path in [&place.paths.data, &place.paths.meta] {
        if let Some(parent) = path.parent() {
            let fail = |source| OpenError::Directory { path: parent.to_path_buf(), source };
            durable::create_dir_all(parent).map_err(fail)?;
        }
    }
    Ok(())
}

fn is_block_device(path: &Path) -> bool {
    use std::os::unix::fs::FileTypeExt;
    std::fs::metadata(path).is_ok_and(|m| m.file_type().is_block_device())
}

pub(super) fn is_unwritten(path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(path).is_ok_and(|m| m.is_file() && m.blocks() == 0)
}
