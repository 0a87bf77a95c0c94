//! Writes through NBD over TCP on loopback: 4 KiB and 64 KiB at random places, 1 MiB one after the other, with 1
//! to 128 in flight, replicated and with replication off, on real processes. Prints one table at the end.
//!
//! `cargo bench -p blkrepl-benches --bench nbd`; with `-- --test` each runs once, as a smoke test.

use std::cell::RefCell;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use blkrepl_benches::{Fixture, Load, Replication, Row, table};
use criterion::{BenchmarkId, Criterion, Throughput};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            eprintln!("{reason:?}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
        .configure_from_args();
    let fixture = Fixture::start()?;
    let mut rows = Vec::new();
    for load in Load::ALL {
        let mut group = criterion.benchmark_group(load.name);
        group.throughput(Throughput::Bytes(u64::from(load.len)));
        for depth in Load::DEPTHS {
            for replication in Replication::ALL {
                let runner = fixture.runner(replication, load, depth)?;
                let row = Row { load, depth, replication, requests: 0, time: Duration::ZERO };
                let row = RefCell::new(row);
                let word = replication.word();
                group.bench_function(BenchmarkId::new(word, depth), |bencher| {
                    bencher.iter_custom(|count| {
                        let time = runner.run(count);
                        let time = time.unwrap_or_else(|e| panic!("{} {depth} {word}: {e:#}", load.name));
                        let mut row = row.borrow_mut();
                        row.requests += count;
                        row.time += time;
                        time
                    });
                });
                rows.push(row.into_inner());
            }
        }
        group.finish();
    }
    criterion.final_summary();
    println!("\n{}", table(&rows));
    fixture.stop()
}
