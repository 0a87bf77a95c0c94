//! Lineages against a model that keeps, for every copy, the changes that its content went through [R17].

use proptest::prelude::*;

use super::super::fixture::Cluster;
use super::*;
use crate::types::SuperblockTrust;

/// The changes that a copy holds, oldest first: the epoch of each, and the lineage in which it was made.
type Past = Vec<(u64, u128)>;

#[derive(Clone, Debug)]
enum Step {
    /// The volume's epoch grows; the copies that follow hold the change.
    Grow(Vec<usize>),
    /// A force onto this copy.
    Force(usize),
    /// The copy is brought everything.
    Resync(usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => prop::collection::vec(0..4usize, 0..4).prop_map(Step::Grow),
        1 => (0..4usize).prop_map(Step::Force),
        1 => (0..4usize).prop_map(Step::Resync),
    ]
}

fn report(past: &Past) -> ReplicaReport {
    let (epoch, lineage) = *past.last().unwrap();
    ReplicaReport {
        trust: SuperblockTrust::Sound,
        epoch: Epoch(epoch),
        reign: Reign(1),
        lineage: LineageId(lineage),
        member: None,
        inconsistent: false,
        clean: false,
        same_os_boot: false,
    }
}

/// Epoch of the last change that both hold, with all before it.
fn common(a: &Past, b: &Past) -> u64 {
    a.iter().zip(b).take_while(|(a, b)| a == b).last().map_or(0, |((epoch, _), _)| *epoch)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// What a copy is said to have in common with the present lineage it has; never more. It is no less
    /// either, unless a force went back to a copy of an earlier lineage: then what is common to that and to
    /// others may be compared for nothing.
    #[test]
    fn r17_a_copy_has_what_it_is_said_to_have_in_common(steps in prop::collection::vec(step(), 1..40)) {
        let mut volume = Cluster::pair().vol().clone();
        let (mut epoch, mut lineage) = (1, volume.lineage.0);
        let mut present: Past = vec![(epoch, lineage)];
        let mut copies = vec![present.clone(); 4];
        let mut went_back = false;
        for step in steps {
            match step {
                Step::Grow(followers) => {
                    epoch += 1;
                    let before = present.clone();
                    present.push((epoch, lineage));
                    for at in followers {
                        if copies[at] == before {
                            copies[at] = present.clone();
                        }
                    }
                }
                Step::Force(onto) => {
                    let fork = volume.shared_epoch(&report(&copies[onto]));
                    prop_assert!(fork.0 <= common(&copies[onto], &present));
                    went_back |= copies[onto].last().unwrap().1 != lineage;
                    (epoch, lineage) = (epoch + 1, lineage + 1);
                    volume.fork(LineageId(lineage), fork);
                    present = copies[onto].clone();
                    present.push((epoch, lineage));
                    copies[onto] = present.clone();
                }
                Step::Resync(at) => copies[at] = present.clone(),
            }
            prop_assert_eq!(volume.lineage, LineageId(lineage));
            for copy in &copies {
                let (shared, common) = (volume.shared_epoch(&report(copy)).0, common(copy, &present));
                let exact = !went_back || report(copy).lineage == volume.lineage;
                prop_assert!(shared <= common, "{} of {:?} with {:?}", shared, copy, present);
                prop_assert!(!exact || shared == common, "only {} of {:?} with {:?}", shared, copy, present);
            }
        }
    }
}

/// States from a snapshot or a disk that would make a replica or the leader go wrong are named, not used.
#[test]
fn a_state_that_breaks_an_invariant_is_named() {
    let good = Cluster::pair().state;
    assert_eq!(good.check(), Ok(()));
    let id = *good.volumes.keys().next().unwrap();
    type Break = fn(&mut VolumeRecord);
    let breaks: [(Break, &str); 12] = [
        (|v| v.settings.intent_regions_max = 0, "a timeout is out of range"),
        (|v| v.settings.peer_timeout = Duration::ZERO, "a timeout is out of range"),
        (|v| v.replicas[1].slot = ReplicaSlot(8), "slot is out of range"),
        (|v| v.replicas[1].slot = v.replicas[0].slot, "or doubled"),
        (|v| v.in_sync.clear(), "in-sync set is empty"),
        (|v| v.in_sync.reverse(), "not sorted"),
        (|v| v.replicas.reverse(), "not sorted"),
        (|v| v.in_sync[1].node = NodeId(9), "a member is not a replica"),
        (|v| v.primary.as_mut().unwrap().incarnation.boot += 1, "primary is not in the in-sync set"),
        (|v| v.primary = None, "exactly if it is demoted"),
        (|v| v.demoted = true, "exactly if it is demoted"),
        (|v| v.reign = Reign(v.epoch.0 + 1), "reign is above the epoch"),
    ];
    for (break_it, expected) in breaks {
        let mut bad = good.clone();
        break_it(bad.volumes.get_mut(&id).unwrap());
        let why = bad.check().unwrap_err();
        assert!(why.contains(expected), "{why:?} does not say {expected:?}");
    }
    let mut moved = good.clone();
    let volume = moved.volumes.remove(&id).unwrap();
    moved.volumes.insert(VolumeId(1234), volume);
    assert!(moved.check().unwrap_err().contains("another id"));
    let mut moved = good;
    let node = moved.nodes.remove(&NodeId(1)).unwrap();
    moved.nodes.insert(NodeId(77), node);
    assert!(moved.check().unwrap_err().contains("stands under"));
}

#[test]
fn a_geometry_that_no_constructor_made_is_found() {
    let mut bytes = super::super::codec::encode(&Cluster::pair().state).unwrap();
    // Its size (1 MiB) and what follows it: block size and region size.
    let wanted = [&(1u64 << 20).to_le_bytes()[..], &4096u32.to_le_bytes(), &65_536u32.to_le_bytes()].concat();
    let at = bytes.windows(16).position(|window| window == wanted).unwrap();
    bytes[at] = 1;
    let crc = crc32fast::hash(&[&bytes[..5], &bytes[9..]].concat());
    bytes[5..9].copy_from_slice(&crc.to_le_bytes());
    let state: ClusterState = super::super::codec::decode(&bytes).unwrap();
    assert!(state.check().unwrap_err().contains("geometry breaks the rules"));
}

#[test]
fn a_store_id_is_read_as_it_is_shown() {
    let id = StoreId(0x0123_4567_89ab_cdef << 64 | 0xfe);
    assert_eq!(id.to_string().parse(), Ok(id));
    assert_eq!("01234567-89ab-cdef-0000-0000000000fe".parse(), Ok(id));
    assert!("store".parse::<StoreId>().is_err());
}
