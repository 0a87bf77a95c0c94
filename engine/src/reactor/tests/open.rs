//! Making, opening, locking and checking the files of a replica.

use std::os::unix::fs::FileExt;

use super::*;
use crate::reactor::open::OpenFile;
use crate::types::SuperblockTrust;

const SIZE: u64 = 1 << 20;

fn expected() -> Expected {
    Expected {
        cluster: Some(ClusterId(1)),
        volume: VolumeId(2),
        node: NodeId(1),
        geometry: geometry(SIZE),
        other_slots: vec![ReplicaSlot(1)],
    }
}

fn reopen(dir: &tempfile::TempDir) -> Result<OpenVolume, OpenError> {
    open(&paths(dir), &expected(), Duration::ZERO)
}

/// A volume's directory, its files closed.
fn made() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    drop(make(&dir, SIZE));
    dir
}

#[test]
fn what_was_made_is_what_is_opened() {
    let dir = tempfile::tempdir().unwrap();
    let made = make(&dir, SIZE);
    let (superblock, layout) = (made.image.superblock.clone(), made.image.layout());
    assert_eq!(made.image.dirty[&ReplicaSlot(1)].count(), 0, "nobody lacks anything");
    drop(made);
    assert_eq!(std::fs::metadata(paths(&dir).meta).unwrap().len(), layout.file_len());
    let opened = reopen(&dir).unwrap();
    assert!(!opened.identity_changed);
    assert_eq!(opened.image.superblock, superblock);
    assert_eq!(opened.image.trust, SuperblockTrust::Sound);
    assert_eq!((opened.image.intent.count(), opened.image.dirty[&ReplicaSlot(1)].count()), (0, 0));
    assert_eq!((opened.image.damaged_pages, opened.image.notes), (0, vec![]));
}

/// [R7]: nobody does anything with the files before it has the lock.
#[test]
fn r7_a_second_opener_is_locked_out_until_the_first_is_gone() {
    let dir = made();
    let first = reopen(&dir).unwrap();
    let error = reopen(&dir).unwrap_err();
    assert!(matches!(&error, OpenError::Locked { part: Part::Meta, .. }), "{error}");
    assert!(error.to_string().contains("v.meta") && error.to_string().contains("fuser"), "{error}");
    let ending = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(100));
        drop(first);
    });
    open(&paths(&dir), &expected(), Duration::from_secs(10)).expect("the lock came free while waiting");
    ending.join().unwrap();
}

/// [R7]: the lock belongs to the open file, and the kernel keeps that open until the last request on it
/// is over, whoever closed it before.
#[test]
fn r7_the_lock_is_held_while_a_request_is_in_the_kernel() {
    use crate::reactor::ring::{Io, Span, Token};
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("fifo");
    rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0)
        .unwrap();
    let open = || std::fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
    let try_lock =
        |file: &std::fs::File| rustix::fs::flock(file, rustix::fs::FlockOperation::NonBlockingLockExclusive);
    let (file, second) = (open(), open());
    try_lock(&file).unwrap();
    let mut io = Io::new(8, 0).unwrap();
    let buf = io.buffers.alloc(4096);
    let fd = std::rc::Rc::new(OwnedFd::from(file));
    io.read(&fd, Span { buf, start: 0, len: 4096 }, 0, Token::Wake);
    drop(fd);
    let mut done = Vec::new();
    io.turn(Some(Duration::from_millis(20)), &mut done).unwrap();
    assert!(try_lock(&second).is_err(), "the request is in the kernel");
    (&second).write_all(b"x").unwrap();
    io.turn(Some(Duration::from_secs(5)), &mut done).unwrap();
    assert_eq!(done.len(), 1);
    // The kernel drops its own reference right after the completion.
    eventually("the lock is free", || try_lock(&second).is_ok());
}

/// [R15]: another file under old metadata is not what the metadata describes, even if its content, its
/// size and its extended attributes are the same.
#[test]
fn r15_another_data_file_under_old_metadata_means_that_everything_is_copied() {
    let dir = made();
    let data = paths(&dir).data;
    let other = dir.path().join("other");
    std::fs::copy(&data, &other).unwrap();
    let tag = xattr(&data).inspect(|tag| set_xattr(&other, tag));
    std::fs::rename(&other, &data).unwrap();
    assert_eq!(xattr(&data), tag);
    let opened = reopen(&dir).unwrap();
    assert!(opened.identity_changed);
    let superblock = &opened.image.superblock;
    assert_eq!((superblock.base, superblock.member, superblock.clean), (BaseContent::Unknown, None, None));
    assert!(opened.image.notes.iter().any(|note| note.contains("v.data")), "{:?}", opened.image.notes);
    drop(opened);
    assert!(reopen(&dir).unwrap().identity_changed, "until the core has written it down");
}

fn xattr(path: &std::path::Path) -> Option<Vec<u8>> {
    let mut tag = [0; 16];
    let len = rustix::fs::getxattr(path, "user.blkrepl.id", &mut tag[..]).ok()?;
    Some(tag[..len].to_vec())
}

fn set_xattr(path: &std::path::Path, tag: &[u8]) {
    rustix::fs::setxattr(path, "user.blkrepl.id", tag, rustix::fs::XattrFlags::empty()).unwrap();
}

#[test]
fn a_data_file_of_another_size_is_refused_with_both_sizes() {
    let dir = made();
    let file = std::fs::OpenOptions::new().write(true).open(paths(&dir).data).unwrap();
    file.set_len(SIZE - 4096).unwrap();
    let error = reopen(&dir).unwrap_err();
    assert!(matches!(error, OpenError::Truncated { found: 1_044_480, expected: SIZE, .. }), "{error}");
    file.set_len(SIZE + 1).unwrap();
    assert!(matches!(reopen(&dir).unwrap_err(), OpenError::TooLong { .. }));
}

#[test]
fn files_that_are_missing_or_belong_elsewhere_are_named() {
    let dir = made();
    let other = |change: &dyn Fn(&mut Expected)| {
        let mut expected = expected();
        change(&mut expected);
        open(&paths(&dir), &expected, Duration::ZERO).unwrap_err().to_string()
    };
    let error = other(&|e| e.volume = VolumeId(77));
    assert!(error.contains("v.meta") && error.contains("4d") && error.contains("volume"), "{error}");
    assert!(other(&|e| e.node = NodeId(4)).contains("node 4"));
    assert!(other(&|e| e.cluster = Some(ClusterId(5))).contains("cluster"));
    assert!(other(&|e| e.geometry = geometry(SIZE * 2)).contains("2097152 bytes"));
    std::fs::remove_file(paths(&dir).data).unwrap();
    let error = reopen(&dir).unwrap_err();
    assert!(matches!(error, OpenError::Missing { part: Part::Data, .. }), "{error}");
    std::fs::create_dir(paths(&dir).data).unwrap();
    assert!(matches!(reopen(&dir).unwrap_err(), OpenError::NotAFile { part: Part::Data, .. }));
    std::fs::remove_file(paths(&dir).meta).unwrap();
    assert!(matches!(reopen(&dir).unwrap_err(), OpenError::Missing { part: Part::Meta, .. }));
}

#[test]
fn damaged_metadata_is_judged_by_how_much_of_it_is_left() {
    let dir = made();
    let file = std::fs::OpenOptions::new().write(true).open(paths(&dir).meta).unwrap();
    file.write_all_at(&[0xFF; 100], 0).unwrap();
    let opened = reopen(&dir).unwrap();
    assert_eq!(opened.image.trust, SuperblockTrust::Doubtful);
    drop(opened);
    file.set_len(8192).unwrap();
    let opened = reopen(&dir).unwrap();
    assert_eq!(opened.image.dirty[&ReplicaSlot(1)].count(), SIZE / 4096, "what is missing reads all-set");
    assert!(opened.image.notes.iter().any(|note| note.contains("cut off")), "{:?}", opened.image.notes);
    drop(opened);
    file.write_all_at(&[0xFF; 100], 4096).unwrap();
    let error = reopen(&dir).unwrap_err();
    assert!(matches!(error, OpenError::Superblock { .. }), "{error}");
    assert!(error.to_string().contains("v.meta"));
}

#[test]
fn create_overwrites_nothing_that_was_ever_written() {
    let again = |dir: &tempfile::TempDir| {
        let slots = [ReplicaSlot(1)];
        create(&paths(dir), superblock(geometry(SIZE)), &slots, false, Duration::ZERO)
    };
    let dir = made();
    assert!(matches!(again(&dir).unwrap_err(), OpenError::Exists { part: Part::Meta, .. }));
    // Interrupted after the data file: carried on with.
    std::fs::remove_file(paths(&dir).meta).unwrap();
    std::fs::write(dir.path().join("v.meta.new"), b"half-made").unwrap();
    let made = again(&dir).unwrap();
    assert_eq!(made.image.dirty[&ReplicaSlot(1)].count(), SIZE / 4096, "others lack everything");
    drop(made);
    assert!(!dir.path().join("v.meta.new").exists());
    assert!(!reopen(&dir).unwrap().identity_changed);
    std::fs::remove_file(paths(&dir).meta).unwrap();
    std::fs::write(paths(&dir).data, b"precious").unwrap();
    assert!(matches!(again(&dir).unwrap_err(), OpenError::Exists { part: Part::Data, .. }));
    assert_eq!(std::fs::read(paths(&dir).data).unwrap(), b"precious");
}

#[test]
fn o_direct_is_used_where_the_file_system_takes_it() {
    let dir = made();
    let files = reopen(&dir).unwrap().files;
    let is_set =
        |file: &OpenFile| rustix::fs::fcntl_getfl(&file.fd).unwrap().contains(rustix::fs::OFlags::DIRECT);
    assert_eq!(is_set(&files.data), files.is_direct());
    assert_eq!(is_set(&files.meta), files.meta.direct);
}

#[test]
fn a_file_that_refuses_o_direct_is_used_without_it() {
    let fd = OwnedFd::from(std::fs::File::open("/proc/self/status").unwrap());
    assert!(!crate::reactor::open::try_direct(&fd).unwrap());
    assert!(!rustix::fs::fcntl_getfl(&fd).unwrap().contains(rustix::fs::OFlags::DIRECT));
}

/// [R7]: of several who make the same replica one succeeds, and nobody writes into what it made.
#[test]
fn r7_of_several_creators_one_makes_the_files_and_the_others_leave_them_alone() {
    for _ in 0..20 {
        let dir = tempfile::tempdir().unwrap();
        let creators: Vec<_> = (0..4_u64)
            .map(|n| {
                let paths = paths(&dir);
                std::thread::spawn(move || {
                    let superblock =
                        Superblock { volume: VolumeId(100 + u128::from(n)), ..superblock(geometry(SIZE)) };
                    let made = create(&paths, superblock, &[ReplicaSlot(1)], true, Duration::from_secs(5));
                    made.map(|made| made.image.superblock.volume)
                })
            })
            .collect();
        let made: Vec<_> = creators.into_iter().filter_map(|c| c.join().unwrap().ok()).collect();
        let [winner] = made[..] else { panic!("{made:?}") };
        let opened = open(&paths(&dir), &Expected { volume: winner, ..expected() }, Duration::ZERO).unwrap();
        assert_eq!(opened.image.superblock.volume, winner);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2, "nothing else is left");
    }
}

/// The node of a device lies in a file system in memory; the device does not.
#[test]
fn a_device_is_no_file_in_memory() {
    let device = OwnedFd::from(std::fs::File::open("/dev/zero").unwrap());
    assert!(!crate::reactor::open::run_in_place(&device).unwrap());
    assert!(!rustix::fs::fcntl_getfl(&device).unwrap().contains(rustix::fs::OFlags::NONBLOCK));
}
