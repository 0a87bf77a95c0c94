//! Files of a volume that never came to be. A volume is created in two steps: its first member makes the files, then
//! the cluster commits the volume. If all that knew of it ends in between, the files stay, and would be in the way of
//! every later volume of that name.
//!
//! Never does: removing files of a volume that exists or may still come to be, or a byte that somebody wrote. Files
//! that this run made stay, and metadata of a block device.

use std::fs::File;
use std::io::ErrorKind;
use std::path::Path;

use blkrepl_engine::control::ClusterState;
use blkrepl_engine::reactor::{self, Expected, LOCK_WAIT_DEFAULT};
use blkrepl_engine::types::{ClusterId, Epoch, Member, NodeId, Reign};

use rustix::fs::SeekFrom;

use super::files::{OpenError, Place, is_unwritten, remove_made};

/// Removes what an earlier run of this node made at this place for a volume that can come to be no more; true if it
/// did. Everything else stays, for the creation to find in its way.
///
/// The creation of a volume names the run that made the files, and the cluster refuses it once a newer run of the node
/// has registered. `state` knows of a newer one, and so also of every volume that was created before.
///
/// # Errors
/// The files cannot be removed.
pub fn remove(
    place: &Place,
    cluster: ClusterId,
    me: NodeId,
    state: &ClusterState,
) -> Result<bool, OpenError> {
    // No metadata, or none that can be read: nothing that this is about.
    let Ok(found) = reactor::superblock_of(place.paths()) else { return Ok(false) };
    let maker = found.member.map(|incarnation| Member { node: me, incarnation });
    let maker_is_over = maker.is_some_and(|maker| state.has_restarted(maker));
    let is_first = (found.epoch, found.reign) == (Epoch(1), Reign(1));
    let is_ours = found.cluster == cluster && found.node == me;
    if !(maker_is_over && is_first && is_ours) || state.volumes.contains_key(&found.volume) {
        return Ok(false);
    }
    let data = place.paths().data.symlink_metadata();
    if data.is_err_and(|error| error.kind() == ErrorKind::NotFound) {
        // A removal that was cut short in its turn.
        reactor::remove_lone_metadata(place.paths(), LOCK_WAIT_DEFAULT)?;
        return Ok(true);
    }
    if !holds_nothing(&place.paths().data) {
        return Ok(false);
    }
    let made = Expected {
        cluster: None,
        volume: found.volume,
        node: me,
        geometry: found.geometry,
        other_slots: Vec::new(),
    };
    remove_made(place, &made)?;
    Ok(true)
}

/// True of a file to which nothing was ever written. One on a device, or on a file system that does not tell, is none.
fn holds_nothing(data: &Path) -> bool {
    let Ok(file) = File::open(data) else { return false };
    is_unwritten(data) && rustix::fs::seek(&file, SeekFrom::Data(0)) == Err(rustix::io::Errno::NXIO)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use blkrepl_engine::control::{NodeAddrs, NodeKind, NodeRecord, StoreId};
    use blkrepl_engine::meta::Superblock;
    use blkrepl_engine::types::{Geometry, Incarnation, LineageId, VolumeId};

    use super::*;
    use crate::config;
    use crate::ops::NewVolume;
    use crate::serve::files::create_first;
    use crate::serve::status::tests::record;

    const CLUSTER: ClusterId = ClusterId(5);

    fn run(boot: u64) -> Member {
        Member { node: NodeId(1), incarnation: Incarnation { boot, nonce: boot } }
    }

    fn new_volume() -> NewVolume {
        NewVolume {
            id: VolumeId(7),
            name: "vol0".into(),
            geometry: Geometry::new(1 << 20, 4096, 1 << 20).unwrap(),
            replicas: vec![NodeId(1), NodeId(2)],
            lineage: LineageId(9),
        }
    }

    fn place(dir: &Path) -> Place {
        let text = format!(
            "[node]\nid = 1\nname = \"n1\"\nkind = \"data\"\ndir = \"{}\"\n[listen]\ncontrol = \
             \"127.0.0.1:1\"\npeer = \"127.0.0.1:2\"\n[[cluster]]\nid = 1\nname = \"n1\"\nkind = \"data\"\n\
             control = \"127.0.0.1:1\"\npeer = \"127.0.0.1:2\"\n",
            dir.display()
        );
        Place::of(&config::parse(&dir.join("node.toml"), &text).unwrap(), "vol0")
    }

    /// A state that knows this run of node 1.
    fn state(newest: Member) -> ClusterState {
        let node = NodeRecord {
            id: newest.node,
            name: "n1".into(),
            kind: NodeKind::Data,
            addrs: NodeAddrs { control: String::new(), peer: String::new(), nbd: String::new() },
            store: StoreId(1),
            incarnation: Some(newest.incarnation),
            os_boot: 0,
        };
        ClusterState { nodes: [(newest.node, node)].into(), ..ClusterState::default() }
    }

    #[test]
    fn files_of_an_older_run_that_nobody_wrote_to_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let place = place(dir.path());
        let remove = |newest: Member, cluster| remove(&place, cluster, NodeId(1), &state(newest)).unwrap();
        assert!(!remove(run(2), CLUSTER), "there are none");
        create_first(&place, &new_volume(), CLUSTER, run(1), 0).unwrap();
        assert!(!remove(run(1), CLUSTER), "its maker still runs");
        assert!(!remove(run(2), ClusterId(6)), "they are of another cluster");
        assert!(remove(run(2), CLUSTER));
        assert!(!place.paths().data.exists() && !place.paths().meta.exists());
        create_first(&place, &new_volume(), CLUSTER, run(2), 0).unwrap();
    }

    #[test]
    fn content_and_files_of_what_may_be_a_volume_stay() {
        let dir = tempfile::tempdir().unwrap();
        let place = place(dir.path());
        create_first(&place, &new_volume(), CLUSTER, run(1), 0).unwrap();
        let mut known = state(run(2));
        known.volumes.insert(VolumeId(7), record());
        assert!(!remove(&place, CLUSTER, NodeId(1), &known).unwrap(), "the volume exists");
        assert!(!remove(&place, CLUSTER, NodeId(2), &state(run(2))).unwrap(), "they are another node's");
        let data = std::fs::OpenOptions::new().write(true).open(&place.paths().data).unwrap();
        data.write_all_at(&[1; 4096], 0).unwrap();
        data.sync_all().unwrap();
        assert!(!remove(&place, CLUSTER, NodeId(1), &state(run(2))).unwrap(), "there is content");
        // As a file that another creation put in its place.
        std::fs::remove_file(&place.paths().data).unwrap();
        File::create(&place.paths().data).unwrap().set_len(1 << 20).unwrap();
        remove(&place, CLUSTER, NodeId(1), &state(run(2))).unwrap_err();
        assert!(place.paths().meta.exists() && place.paths().data.exists());
    }

    #[test]
    fn a_removal_that_was_cut_short_is_ended() {
        let dir = tempfile::tempdir().unwrap();
        let place = place(dir.path());
        create_first(&place, &new_volume(), CLUSTER, run(1), 0).unwrap();
        std::fs::remove_file(&place.paths().data).unwrap();
        assert!(remove(&place, CLUSTER, NodeId(1), &state(run(2))).unwrap());
        assert!(!place.paths().meta.exists());
    }

    #[test]
    fn files_of_a_replica_that_is_no_first_member_stay() {
        let dir = tempfile::tempdir().unwrap();
        let place = place(dir.path());
        create_first(&place, &new_volume(), CLUSTER, run(1), 0).unwrap();
        let found = reactor::superblock_of(place.paths()).unwrap();
        for other in [
            Superblock { member: None, ..found.clone() },
            Superblock { epoch: Epoch(2), ..found.clone() },
            Superblock { reign: Reign(2), ..found },
        ] {
            let mut superblock = other;
            let meta = std::fs::OpenOptions::new().write(true).open(&place.paths().meta).unwrap();
            superblock.advance().iter().for_each(|(at, bytes)| meta.write_all_at(bytes, *at).unwrap());
            assert!(!remove(&place, CLUSTER, NodeId(1), &state(run(2))).unwrap());
        }
    }
}
