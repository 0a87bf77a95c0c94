//! The load generator against the server, over real sockets, with volumes in memory behind it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

mod common;

use std::sync::atomic::Ordering;
use std::time::Duration;

use blkrepl_nbd::NbdError;
use blkrepl_nbd::bench::{BenchOptions, Job, Pattern, run};
use common::{Manner, Memory, TestServer, Volume};

const SIZE: usize = 4 << 20;

/// So many operations without a warm-up.
fn counted(job: Job, depth: usize, count: u64) -> BenchOptions {
    BenchOptions {
        warm_up: Duration::ZERO,
        time: Duration::from_secs(60),
        count: Some(count),
        destroys_data: true,
        ..BenchOptions::new(job, depth)
    }
}

fn writes() -> Job {
    Job { read_percent: 0, ..Job::default() }
}

#[test]
fn every_kind_of_job_runs_over_tcp_and_unix() {
    let volume = Volume::new(SIZE, Manner::InOrder);
    let server = TestServer::start(Memory::one(&volume));
    let jobs = [
        Job::default(),
        writes(),
        Job { read_percent: 70, ..Job::default() },
        Job { pattern: Pattern::Sequential, block_size: 1 << 20, ..writes() },
        Job { pattern: Pattern::Sequential, block_size: 65536, read_percent: 50, ..writes() },
        Job { block_size: 512, fua: true, ..writes() },
    ];
    for uri in [server.unix("vol0"), server.tcp("vol0")] {
        for job in jobs {
            for depth in [1, 16] {
                let report = run(&uri, &counted(job, depth, 200)).unwrap();
                // A receive may bring more answers than were asked for, but never fewer.
                assert!(report.operations >= 200, "{job:?}: {report:?}");
                assert_eq!(report.bytes, report.operations * u64::from(job.block_size));
                assert_eq!(report.read_latency.is_some(), job.reads(), "{report:?}");
                assert_eq!(report.write_latency.is_some(), job.writes(), "{report:?}");
                let latency = report.latency;
                let rising =
                    [latency.p50_ns, latency.p90_ns, latency.p99_ns, latency.p999_ns, latency.max_ns];
                assert!(latency.p50_ns > 0 && rising.is_sorted(), "{latency:?}");
            }
        }
    }
    assert!(volume.fuas.load(Ordering::Relaxed) >= 800);
}

#[test]
fn several_connections_share_the_work() {
    let volume = Volume::new(SIZE, Manner::InOrder);
    let server = TestServer::start(Memory::one(&volume));
    for uri in [server.unix("vol0"), server.tcp("vol0")] {
        let job = Job { pattern: Pattern::Sequential, block_size: 65536, ..writes() };
        let options = BenchOptions { connections: 3, ..counted(job, 4, 400) };
        assert!(run(&uri, &options).unwrap().operations >= 400);
    }
    assert!(volume.data.lock().unwrap().iter().any(|byte| *byte != 0));
}

#[test]
fn each_write_is_followed_by_its_flush() {
    let volume = Volume::new(SIZE, Manner::InOrder);
    let server = TestServer::start(Memory::one(&volume));
    let job = Job { flush_after_write: true, ..writes() };
    let report = run(&server.unix("vol0"), &counted(job, 4, 100)).unwrap();
    let flushes = volume.flushes.load(Ordering::Relaxed);
    // What was in flight at the end is answered as well, and not counted.
    assert!((report.operations..report.operations + 8).contains(&flushes), "{flushes}: {report:?}");
}

#[test]
fn only_the_area_is_written() {
    let volume = Volume::new(SIZE, Manner::InOrder);
    let server = TestServer::start(Memory::one(&volume));
    let options = BenchOptions { offset: 1 << 20, area: Some(1 << 20), ..counted(writes(), 8, 5000) };
    run(&server.unix("vol0"), &options).unwrap();
    let data = volume.data.lock().unwrap();
    let touched = |range: std::ops::Range<usize>| data[range].iter().any(|byte| *byte != 0);
    assert!(!touched(0..1 << 20) && touched(1 << 20..2 << 20) && !touched(2 << 20..SIZE));
}

#[test]
fn reads_alone_change_nothing_and_need_no_leave() {
    let volume = Volume::new(SIZE, Manner::InOrder);
    let server = TestServer::start(Memory::one(&volume));
    let options = BenchOptions { destroys_data: false, ..counted(Job::default(), 8, 500) };
    run(&server.unix("vol0"), &options).unwrap();
    let refused = BenchOptions { destroys_data: false, ..counted(writes(), 8, 500) };
    assert!(matches!(run(&server.unix("vol0"), &refused), Err(NbdError::Usage(_))));
    assert!(volume.data.lock().unwrap().iter().all(|byte| *byte == 0));
}

#[test]
fn the_end_of_the_server_ends_the_run() {
    for manner in [Manner::CloseAfter(50), Manner::Drop] {
        let volume = Volume::new(SIZE, manner);
        let server = TestServer::start(Memory::one(&volume));
        let error = run(&server.unix("vol0"), &counted(writes(), 4, 1000)).unwrap_err();
        assert!(matches!(error, NbdError::Disconnected(_)), "{error}");
    }
}

#[test]
fn the_servers_cpu_time_is_measured_where_its_process_is_named() {
    let volume = Volume::new(SIZE, Manner::InOrder);
    let server = TestServer::start(Memory::one(&volume));
    let options = BenchOptions { pids: vec![std::process::id()], ..counted(writes(), 4, 1000) };
    let report = run(&server.unix("vol0"), &options).unwrap();
    assert!(report.server_cpu_us().is_some_and(|us| us > 0.0), "{report:?}");
    let options = BenchOptions { pids: vec![u32::MAX], ..options };
    assert!(matches!(run(&server.unix("vol0"), &options), Err(NbdError::Usage(_))));
}
