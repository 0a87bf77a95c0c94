//! The store against openraft's own suite, against disks that fail at every write, and against missing,
//! foreign and rolled back files.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::{fs, io};

use openraft::entry::RaftEntry;
use openraft::testing::{StoreBuilder, Suite};
use proptest::prelude::*;
use redb::{BackendError, StorageBackend};

use crate::types::{ClusterId, LogIndex, Nanos, NodeId};

use super::super::environment::{Listener, Pending, StoreFile, Stream, System};
use super::super::error::ControlError;
use super::super::raft::{Entry, LogId, StorageError, TypeConfig, Vote};
use super::super::state::StoreId;
use super::*;

fn system() -> System {
    System::new(super::super::boot_time)
}

fn create(dir: &Path, me: NodeId) -> Result<StoreId, ControlError> {
    super::create(&system(), dir, me)
}

fn open(dir: &Path, me: NodeId) -> Result<Opened, ControlError> {
    super::open(&system(), dir, me)
}

fn store_path(dir: &Path) -> PathBuf {
    super::store_path(&system(), dir)
}

fn boot_path(dir: &Path) -> PathBuf {
    system().store_dir(dir).path(boot::FILE)
}

fn log_id(term: u64, index: u64) -> LogId {
    LogId::new(openraft::CommittedLeaderId::new(term, 1), index)
}

fn entry(term: u64, index: u64) -> (u64, Vec<u8>) {
    let entry = Entry::new_blank(log_id(term, index));
    (index, super::super::codec::encode(&entry).unwrap())
}

struct Builder;

impl StoreBuilder<TypeConfig, StoreHandle, StateMachine, tempfile::TempDir> for Builder {
    async fn build(&self) -> Result<(tempfile::TempDir, StoreHandle, StateMachine), StorageError> {
        let dir = tempfile::tempdir().unwrap();
        create(dir.path(), NodeId(1)).unwrap();
        let opened = open(dir.path(), NodeId(1)).unwrap();
        let (handle, _) = StoreHandle::start(&system(), opened.db).unwrap();
        let (machine, _) = StateMachine::load(Arc::new(system()), handle.clone()).await.unwrap();
        Ok((dir, handle, machine))
    }
}

#[test]
fn the_store_passes_openrafts_suite() {
    Suite::test_all(Builder).unwrap();
}

/// The same on the disk below, with the worker as a task, as the simulator runs it.
struct OnDisk;

impl StoreBuilder<TypeConfig, StoreHandle, StateMachine, ()> for OnDisk {
    async fn build(&self) -> Result<((), StoreHandle, StateMachine), StorageError> {
        let identity = StoreIdentity { store: StoreId(1), node: NodeId(1) };
        let backend = FaultBackend::default();
        drop(Db::create_on(backend.clone(), identity).unwrap());
        // Nothing of it was lost, although no cache was kept.
        backend.0.lock().unwrap().crash(|_| false);
        let (handle, _) = StoreHandle::start(&TaskEnv, Db::open_on(backend).unwrap()).unwrap();
        let (machine, _) = StateMachine::load(Arc::new(TaskEnv), handle.clone()).await.unwrap();
        Ok(((), handle, machine))
    }
}

/// The operating system, but for the store's thread.
struct TaskEnv;

impl Environment for TaskEnv {
    fn now(&self) -> Nanos {
        system().now()
    }

    fn random(&self) -> io::Result<u128> {
        system().random()
    }

    fn connect(&self, addr: String) -> Pending<'static, io::Result<Box<dyn Stream>>> {
        system().connect(addr)
    }

    fn listen(&self, addr: SocketAddr) -> Pending<'static, io::Result<Box<dyn Listener>>> {
        system().listen(addr)
    }

    fn store_dir(&self, dir: &Path) -> Box<dyn StoreDir> {
        system().store_dir(dir)
    }

    fn start_store(&self, worker: StoreWorker) -> io::Result<()> {
        tokio::spawn(worker.run(tokio::task::yield_now));
        Ok(())
    }
}

#[test]
fn the_store_passes_openrafts_suite_on_a_disk_with_a_cache_and_as_a_task() {
    Suite::test_all(OnDisk).unwrap();
}

/// A disk: what is durable, and what was written since the last sync, in order.
#[derive(Debug, Default)]
struct Disk {
    durable: Vec<u8>,
    volatile: Vec<u8>,
    unsynced: Vec<(u64, Vec<u8>)>,
    /// Operations left until everything fails; `None` never fails.
    left: Option<u64>,
    ops: u64,
}

impl Disk {
    fn step(&mut self) -> io::Result<()> {
        self.ops += 1;
        match &mut self.left {
            Some(0) => Err(io::Error::other("the disk failed")),
            Some(n) => {
                *n -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// The power fails: of what was not synced, the writes that `keep` says survive, in order.
    fn crash(&mut self, keep: impl Fn(usize) -> bool) {
        for (i, (offset, data)) in std::mem::take(&mut self.unsynced).into_iter().enumerate() {
            if keep(i) {
                let end = offset as usize + data.len();
                if self.durable.len() < end {
                    self.durable.resize(end, 0);
                }
                self.durable[offset as usize..end].copy_from_slice(&data);
            }
        }
        self.volatile = self.durable.clone();
        self.left = None;
    }
}

#[derive(Clone, Debug, Default)]
struct FaultBackend(Arc<Mutex<Disk>>);

impl StorageBackend for FaultBackend {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.lock().unwrap().volatile.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let disk = self.0.lock().unwrap();
        let end = offset as usize + out.len();
        let Some(data) = disk.volatile.get(offset as usize..end) else {
            return Err(io::ErrorKind::UnexpectedEof.into());
        };
        out.copy_from_slice(data);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut disk = self.0.lock().unwrap();
        disk.step()?;
        disk.volatile.resize(len as usize, 0);
        // A file's length is taken to be durable at once; its content is not.
        disk.durable.resize(len as usize, 0);
        disk.unsynced.retain(|(offset, data)| offset + data.len() as u64 <= len);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut disk = self.0.lock().unwrap();
        disk.step()?;
        disk.durable = disk.volatile.clone();
        disk.unsynced.clear();
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut disk = self.0.lock().unwrap();
        let failed = disk.step();
        // A write that fails may have got half of its bytes down.
        let data = if failed.is_err() { &data[..data.len() / 2] } else { data };
        let end = offset as usize + data.len();
        if disk.volatile.len() < end {
            disk.volatile.resize(end, 0);
        }
        disk.volatile[offset as usize..end].copy_from_slice(data);
        disk.unsynced.push((offset, data.to_vec()));
        failed
    }

    fn try_lock_range(&self, _: std::ops::Bound<u64>, _: std::ops::Bound<u64>) -> Result<bool, BackendError> {
        Ok(true)
    }

    fn unlock_range(&self, _: std::ops::Bound<u64>, _: std::ops::Bound<u64>) -> Result<(), BackendError> {
        Ok(())
    }
}

/// What was answered as done, and what may or may not have been.
#[derive(Debug, Default)]
struct Promised {
    vote: Option<Vote>,
    entries: BTreeMap<u64, u64>,
    applied: LogIndex,
    /// The operation that failed.
    doubt: Option<usize>,
}

/// Runs a fixed script until the first failure.
fn script(db: &Db) -> Promised {
    let mut p = Promised::default();
    let mut machine = Machine::default();
    for i in 0..24u64 {
        let term = 1 + i / 8;
        let done = match i % 4 {
            0 => {
                let vote = Vote::new(term, i);
                db.set_vote(&vote).map(|()| p.vote = Some(vote))
            }
            1 | 2 => {
                let next = p.entries.last_key_value().map_or(1, |(index, _)| index + 1);
                let batch: Vec<_> = (next..next + 3).map(|index| entry(term, index)).collect();
                db.append(&batch).map(|()| p.entries.extend((next..next + 3).map(|index| (index, term))))
            }
            _ if i == 11 => {
                let last = *p.entries.last_key_value().unwrap().0;
                db.truncate(last).map(|()| {
                    p.entries.remove(&last);
                })
            }
            _ => {
                machine.state.applied = LogIndex(i);
                db.set_machine(&machine).map(|()| p.applied = LogIndex(i))
            }
        };
        if done.is_err() {
            p.doubt = Some(i as usize);
            return p;
        }
    }
    p
}

fn check(p: &Promised, db: &Db, context: &str) {
    // The failed operation may have taken effect, whole.
    let doubt = p.doubt.map(|i| i % 4);
    let vote = db.vote().unwrap();
    assert!(vote == p.vote || (doubt == Some(0) && vote > p.vote), "{context}: vote {vote:?}, {p:?}");
    let entries: BTreeMap<u64, u64> =
        db.entries(..).unwrap().iter().map(|e| (e.log_id.index, e.log_id.leader_id.term)).collect();
    let mut promised = p.entries.clone();
    let same = match (doubt, p.doubt) {
        (Some(1 | 2), _) => {
            let extra = entries.len() - promised.len().min(entries.len());
            (extra == 0 || extra == 3) && promised.iter().all(|(i, t)| entries.get(i) == Some(t))
        }
        (_, Some(11)) if entries.len() + 1 == promised.len() => {
            promised.pop_last();
            promised == entries
        }
        _ => promised == entries,
    };
    assert!(same, "{context}: {entries:?}, {p:?}");
    let applied = db.machine().unwrap().state.applied;
    assert!(applied == p.applied || (doubt == Some(3) && applied > p.applied), "{context}: {applied}");
}

#[test]
fn r13_a_store_whose_disk_fails_at_any_write_never_loses_what_it_acknowledged() {
    let identity = StoreIdentity { store: StoreId(1), node: NodeId(1) };
    let fresh = FaultBackend::default();
    drop(Db::create_on(fresh.clone(), identity).unwrap());
    let base = fresh.0.lock().unwrap().volatile.clone();
    let run = |left: Option<u64>| {
        let disk = Disk { durable: base.clone(), volatile: base.clone(), ..Disk::default() };
        let backend = FaultBackend(Arc::new(Mutex::new(disk)));
        let db = Db::open_on(backend.clone()).unwrap();
        backend.0.lock().unwrap().ops = 0;
        backend.0.lock().unwrap().left = left;
        let promised = script(&db);
        let ops = backend.0.lock().unwrap().ops;
        // The crash comes before redb can tidy up.
        std::mem::forget(db);
        (backend, promised, ops)
    };
    let (_, whole, ops) = run(None);
    assert!(whole.doubt.is_none() && ops > 50, "{ops} operations");
    for n in 0..ops {
        for (name, keep) in [
            ("nothing", (|_| false) as fn(usize) -> bool),
            ("everything", |_| true),
            ("odd writes", |i| i % 2 == 1),
            ("even writes", |i| i % 2 == 0),
        ] {
            let (backend, promised, _) = run(Some(n));
            assert!(promised.doubt.is_some());
            backend.0.lock().unwrap().crash(keep);
            let db = Db::open_on(backend).unwrap_or_else(|e| panic!("failure {n}, kept {name}: {e}"));
            check(&promised, &db, &format!("failure {n}, kept {name}"));
        }
    }
}

#[test]
fn r13_a_store_is_never_created_by_opening_nor_over_another() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(open(dir.path(), NodeId(1)), Err(ControlError::Missing(_))));
    assert!(!store_path(dir.path()).exists());
    let id = create(dir.path(), NodeId(1)).unwrap();
    assert!(matches!(create(dir.path(), NodeId(1)), Err(ControlError::Exists(_))));
    assert!(matches!(open(dir.path(), NodeId(2)), Err(ControlError::OtherNode { .. })));
    let opened = open(dir.path(), NodeId(1)).unwrap();
    assert_eq!((opened.identity.store, opened.incarnation.boot, opened.cluster), (id, 1, None));
    assert!(matches!(open(dir.path(), NodeId(1)), Err(ControlError::InUse(_))));
    opened.db.adopt_cluster(ClusterId(5)).unwrap();
    opened.db.adopt_cluster(ClusterId(6)).unwrap_err();
    drop(opened);
    let again = open(dir.path(), NodeId(1)).unwrap();
    assert_eq!((again.incarnation.boot, again.cluster), (2, Some(ClusterId(5))));
}

#[test]
fn r13_what_stands_in_the_way_of_a_creation_is_named_and_one_that_was_cut_short_is_repeated() {
    let dir = tempfile::tempdir().unwrap();
    create(dir.path(), NodeId(1)).unwrap();
    let path = store_path(dir.path());
    let Err(ControlError::Exists(named)) = create(dir.path(), NodeId(1)) else { panic!("created twice") };
    assert_eq!(named, path);
    // Cut short: the boot file is there, the store is not, and nothing ever ran.
    fs::remove_file(&path).unwrap();
    create(dir.path(), NodeId(1)).unwrap();
    drop(open(dir.path(), NodeId(1)).unwrap());
    // Lost after it ran: it has cast votes.
    fs::remove_file(&path).unwrap();
    let Err(ControlError::Exists(named)) = create(dir.path(), NodeId(1)) else { panic!("made anew") };
    assert_eq!(named, boot_path(dir.path()));
}

#[test]
fn r19_a_recovery_that_dies_before_the_boot_file_is_written_is_whole() {
    let dir = tempfile::tempdir().unwrap();
    let old = create(dir.path(), NodeId(1)).unwrap();
    drop(open(dir.path(), NodeId(1)).unwrap());
    let before = fs::read(boot_path(dir.path())).unwrap();
    let (new, cluster) = (StoreId(old.0 ^ 1), ClusterId(9));
    let (db, _, boot) = open_uncounted(&system(), dir.path(), NodeId(1)).unwrap();
    let files = system().store_dir(dir.path());
    restart_as(files.as_ref(), &db, boot, new, &Machine::default(), cluster, &Vote::new(3, 1)).unwrap();
    drop(db);
    fs::write(boot_path(dir.path()), before).unwrap();
    drop(open_uncounted(&system(), dir.path(), NodeId(1)).unwrap());
    let opened = open(dir.path(), NodeId(1)).unwrap();
    assert_eq!((opened.identity.store, opened.cluster), (new, Some(cluster)));
    assert_eq!(
        (opened.incarnation.boot, boot::read(system().store_dir(dir.path()).as_ref()).unwrap()),
        (2, (new, 2))
    );
    assert_eq!(opened.db.vote().unwrap(), Some(Vote::new(3, 1)));
    // The store of before the recovery is no way back.
    drop(opened);
    let other = tempfile::tempdir().unwrap();
    create(other.path(), NodeId(1)).unwrap();
    fs::copy(boot_path(other.path()), boot_path(dir.path())).unwrap();
    assert!(matches!(open(dir.path(), NodeId(1)), Err(ControlError::Damaged { .. })));
}

/// A directory on a disk that takes so many more files and is full then.
struct Filling {
    dir: Box<dyn StoreDir>,
    left: std::cell::Cell<u32>,
}

impl StoreDir for Filling {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path(name)
    }
    fn create_dir(&self) -> io::Result<()> {
        self.dir.create_dir()
    }
    fn exists(&self, name: &str) -> bool {
        self.dir.exists(name)
    }
    fn len(&self, name: &str) -> io::Result<u64> {
        self.dir.len(name)
    }
    fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        self.dir.read(name)
    }
    fn replace(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let left = self.left.get().checked_sub(1).ok_or(io::ErrorKind::StorageFull)?;
        self.left.set(left);
        self.dir.replace(name, bytes)
    }
    fn create(&self, name: &str) -> io::Result<StoreFile> {
        self.dir.create(name)
    }
    fn open(&self, name: &str) -> io::Result<StoreFile> {
        self.dir.open(name)
    }
    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.dir.rename(from, to)
    }
}

#[test]
fn r19_recoveries_that_die_before_the_boot_file_is_written_leave_a_store_that_opens() {
    for room in [0, 1] {
        let dir = tempfile::tempdir().unwrap();
        let old = create(dir.path(), NodeId(1)).unwrap();
        drop(open(dir.path(), NodeId(1)).unwrap());
        for attempt in 1..=3 {
            let (db, _, boot) = open_uncounted(&system(), dir.path(), NodeId(1)).unwrap();
            let full = Filling { dir: system().store_dir(dir.path()), left: room.into() };
            let (new, cluster) = (StoreId(old.0 ^ attempt), ClusterId(attempt));
            let tried = restart_as(&full, &db, boot, new, &Machine::default(), cluster, &Vote::new(3, 1));
            assert!(matches!(tried, Err(ControlError::Io { .. })), "{tried:?}");
        }
        let opened = open(dir.path(), NodeId(1)).unwrap();
        // Where nothing could be written, nothing was done.
        assert_eq!(opened.cluster, (room > 0).then_some(ClusterId(3)));
    }
}

#[test]
fn a_full_disk_is_not_taken_for_damage() {
    let path = Path::new("/d/control.redb");
    let of = |kind: io::ErrorKind| DbError::Redb(redb::Error::Io(kind.into())).at(path);
    assert!(matches!(of(io::ErrorKind::StorageFull), ControlError::Io { .. }));
    assert!(matches!(of(io::ErrorKind::UnexpectedEof), ControlError::Damaged { .. }));
    assert!(of(io::ErrorKind::StorageFull).to_string().contains("control.redb"));
}

#[test]
fn r13_a_store_that_was_rolled_back_damaged_or_mixed_up_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    create(dir.path(), NodeId(1)).unwrap();
    let path = store_path(dir.path());
    drop(open(dir.path(), NodeId(1)).unwrap());
    let backup = fs::read(&path).unwrap();
    drop(open(dir.path(), NodeId(1)).unwrap());
    let current = fs::read(&path).unwrap();
    fs::write(&path, &backup).unwrap();
    assert!(matches!(open(dir.path(), NodeId(1)), Err(ControlError::RolledBack { store: 1, file: 2, .. })));
    fs::write(&path, b"").unwrap();
    assert!(matches!(open(dir.path(), NodeId(1)), Err(ControlError::Damaged { .. })));
    fs::write(&path, vec![0x55; current.len()]).unwrap();
    assert!(matches!(open(dir.path(), NodeId(1)), Err(ControlError::Damaged { .. })));
    fs::write(&path, &current).unwrap();
    drop(open(dir.path(), NodeId(1)).unwrap());
    // The boot file of another store, and none.
    let other = tempfile::tempdir().unwrap();
    create(other.path(), NodeId(1)).unwrap();
    fs::copy(boot_path(other.path()), boot_path(dir.path())).unwrap();
    assert!(matches!(open(dir.path(), NodeId(1)), Err(ControlError::Damaged { .. })));
    fs::remove_file(boot_path(dir.path())).unwrap();
    assert!(matches!(open(dir.path(), NodeId(1)), Err(ControlError::Damaged { .. })));
}

/// What the log does, on a disk that loses power with whatever was not synced.
#[derive(Clone, Debug)]
enum LogStep {
    Append(u64, u64),
    Truncate(u64),
    Purge(u64),
    Crash(u8),
}

fn log_step() -> impl Strategy<Value = LogStep> {
    prop_oneof![
        4 => (1u64..4, 1u64..6).prop_map(|(term, count)| LogStep::Append(term, count)),
        2 => (1u64..12).prop_map(LogStep::Truncate),
        2 => (0u64..4).prop_map(LogStep::Purge),
        1 => any::<u8>().prop_map(LogStep::Crash),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    /// The model of the log is a map from index to term, and the last index that was purged.
    #[test]
    fn the_log_is_a_map_that_outlives_power_loss(
        steps in proptest::collection::vec(log_step(), 1..25), range in (0u64..30, 0u64..30),
    ) {
        let identity = StoreIdentity { store: StoreId(1), node: NodeId(1) };
        let backend = FaultBackend::default();
        let mut db = Db::create_on(backend.clone(), identity).unwrap();
        let (mut model, mut purged, mut next) = (BTreeMap::new(), None, 1);
        for step in steps {
            match step {
                LogStep::Append(term, count) => {
                    let batch: Vec<_> = (next..next + count).map(|index| entry(term, index)).collect();
                    db.append(&batch).unwrap();
                    model.extend((next..next + count).map(|index| (index, term)));
                    next += count;
                }
                LogStep::Truncate(back) => {
                    // Raft never truncates what it has purged.
                    next = next.saturating_sub(back).max(purged.map_or(1, |id: LogId| id.index + 1));
                    db.truncate(next).unwrap();
                    model.retain(|index, _| *index < next);
                }
                LogStep::Purge(at) => if let Some((index, term)) = model.iter().nth(at as usize) {
                    let id = log_id(*term, *index);
                    db.purge(&id).unwrap();
                    purged = Some(id);
                    model.retain(|index, _| *index > id.index);
                },
                LogStep::Crash(keep) => {
                    std::mem::forget(db);
                    backend.0.lock().unwrap().crash(|at| keep & (1 << (at % 8)) != 0);
                    db = Db::open_on(backend.clone()).unwrap();
                }
            }
            let found = |entries: Vec<Entry>| -> BTreeMap<u64, u64> {
                entries.iter().map(|e| (e.log_id.index, e.log_id.leader_id.term)).collect()
            };
            prop_assert_eq!(found(db.entries(..).unwrap()), model.clone());
            let (from, to) = (range.0.min(range.1), range.0.max(range.1));
            let part: BTreeMap<u64, u64> = model.range(from..to).map(|(i, t)| (*i, *t)).collect();
            prop_assert_eq!(found(db.entries(from..to).unwrap()), part);
            let last = model.last_key_value().map(|(index, term)| log_id(*term, *index));
            prop_assert_eq!((db.last_entry().unwrap(), db.purged().unwrap()), (last, purged));
        }
    }
}
