//! 4 KiB random writes at depth 1 and 32 and 1 MiB sequential writes through NBD over TCP on loopback,
//! replicated and with replication off, on real processes. Prints one table at the end.
//!
//! `cargo bench -p blkrepl-benches`; with `-- --test` each load runs once, as a smoke test.

use std::cell::RefCell;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use blkrepl_benches::{Fixture, Load, Replication, Row, table};
use criterion::{Criterion, Throughput};

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
        .warm_up_time(Duration::from_secs(1))
        .measurement_time(Duration::from_secs(4))
        .configure_from_args();
    let fixture = Fixture::start()?;
    let mut rows = Vec::new();
    for load in Load::ALL {
        let mut group = criterion.benchmark_group(load.name);
        group.throughput(Throughput::Bytes(u64::from(load.len)));
        for replication in Replication::ALL {
            let runner = RefCell::new(fixture.runner(replication, load)?);
            let row = RefCell::new(Row { load, replication, requests: 0, time: Duration::ZERO });
            group.bench_function(replication.word(), |bencher| {
                bencher.iter_custom(|count| {
                    let time = runner.borrow_mut().run(count);
                    let time = time
                        .unwrap_or_else(|reason| panic!("{} {}: {reason:#}", load.name, replication.word()));
                    let mut row = row.borrow_mut();
                    row.requests += count;
                    row.time += time;
                    time
                });
            });
            rows.push(row.into_inner());
        }
        group.finish();
    }
    criterion.final_summary();
    println!("\n{}", table(&rows));
    fixture.stop()
}
