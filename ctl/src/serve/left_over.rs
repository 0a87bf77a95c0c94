//! Files of a volume that never came to be. A volume is created in two steps: its first member makes the files, then
//! the cluster commits the volume. If all that knew of it ends in between, the files stay, and would be in the way of
//! every later volume of that name.
//!
//! Never does: removing files of a volume that exists or may still come to be, or a byte that somebody wrote.

use blkrepl_engine::control::ClusterState;
use blkrepl_engine::reactor::{self, Expected};
use blkrepl_engine::types::{ClusterId, Epoch, Member, NodeId, Reign};

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
    if !(maker_is_over && is_first && is_ours)
        || state.volumes.contains_key(&found.volume)
        || !is_unwritten(&place.paths().data)
    {
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

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;
    use std::path::Path;

    use blkrepl_engine::control::{NodeAddrs, NodeKind, NodeRecord, StoreId};
    use blkrepl_engine::types::{Geometry, Incarnation, LineageId, VolumeId};

    use super::*;
    use crate::config;
    use crate::ops::NewVolume;
    use crate::serve::files::create_first;

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
    fn content_stays() {
        let dir = tempfile::tempdir().unwrap();
        let place = place(dir.path());
        create_first(&place, &new_volume(), CLUSTER, run(1), 0).unwrap();
        let data = std::fs::OpenOptions::new().write(true).open(&place.paths().data).unwrap();
        data.write_all_at(&[1; 4096], 0).unwrap();
        data.sync_all().unwrap();
        assert!(!remove(&place, CLUSTER, NodeId(1), &state(run(2))).unwrap());
        assert!(place.paths().meta.exists());
    }
}
