//! The verifying client itself, against another NBD server (qemu-nbd on a file): it must accept a
//! server that keeps its word, through kills, and find what a broken one does.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use blkrepl_tests::cluster::scratch_dir;
use blkrepl_tests::proc::{Proc, missing};
use blkrepl_tests::report::skipped;
use blkrepl_tests::verify::{Verifier, VerifierOptions};
use blkrepl_tests::wait::wait_until;

const LIMIT: Duration = Duration::from_secs(20);

/// A server of `file` on a socket beside it.
fn serve(file: &Path) -> Result<Proc> {
    let socket = file.with_extension("sock");
    let _ = std::fs::remove_file(&socket);
    let mut command = Command::new("qemu-nbd");
    command.args(["--persistent", "--shared=16", "--format=raw", "--discard=unmap", "--export-name=vol0"]);
    command.arg("--socket").arg(&socket).arg(file);
    let server = Proc::spawn("qemu-nbd", &mut command, &file.with_extension("log"))?;
    wait_until("qemu-nbd", LIMIT, || socket.exists())?;
    Ok(server)
}

/// qemu-nbd has no order between overlapping requests of several clients and tears blocks then, which
/// the verifier finds; so either one worker has the shared units or several have none.
fn options(unit_len: usize, workers: u64) -> VerifierOptions {
    let shared_units = if workers == 1 { 64 } else { 0 };
    let pause = Duration::ZERO;
    VerifierOptions { unit_len, workers, shared_units, private_units: 64, pause, ..Default::default() }
}

fn area(dir: &Path, options: &VerifierOptions) -> Result<(std::path::PathBuf, Vec<String>)> {
    let file = dir.join("disk");
    std::fs::File::create(&file)?.set_len(options.len())?;
    Ok((file.clone(), vec![format!("nbd+unix:///vol0?socket={}", file.with_extension("sock").display())]))
}

#[test]
fn accepts_a_server_that_is_killed_but_loses_nothing() -> Result<()> {
    if let Some(reason) = missing(&["qemu-nbd"]) {
        skipped("accepts_a_server_that_is_killed_but_loses_nothing", &reason);
        return Ok(());
    }
    for (unit_len, workers) in [(4096, 4), (512, 4), (4096, 1)] {
        let dir = scratch_dir()?;
        let options = options(unit_len, workers);
        let (file, targets) = area(dir.path(), &options)?;
        let mut server = serve(&file)?;
        let mut verifier = Verifier::new(targets, options);
        for _ in 0..3 {
            let running = verifier.start();
            running.wait_progress(500, LIMIT)?;
            drop(server);
            server = serve(&file)?;
            running.wait_progress(500, LIMIT)?;
            let report = running.stop()?;
            assert!(report.connects >= 2 * workers, "no worker had to reconnect: {report:?}");
            verifier.verify()?;
        }
        // A file outlives its server with all that was written, so more than the flushed part is there.
        verifier.verify_flushed()?;
    }
    Ok(())
}

#[test]
fn finds_what_a_broken_server_does() -> Result<()> {
    if let Some(reason) = missing(&["qemu-nbd"]) {
        skipped("finds_what_a_broken_server_does", &reason);
        return Ok(());
    }
    type Break = fn(&std::fs::File, &[u8]) -> std::io::Result<()>;
    let ways: [(&str, Break); 4] = [
        ("an older block is back", |file, old| file.write_all_at(old, 0)),
        ("half a block is older", |file, old| file.write_all_at(&old[..2048], 0)),
        ("a block is zero", |file, _| file.write_all_at(&[0; 4096], 0)),
        ("a block is another's", |file, _| {
            let mut other = [0; 4096];
            file.read_exact_at(&mut other, 4096)?;
            file.write_all_at(&other, 0)
        }),
    ];
    for (name, damage) in ways {
        let dir = scratch_dir()?;
        let options = options(4096, 1);
        let (file, targets) = area(dir.path(), &options)?;
        let server = serve(&file)?;
        let mut verifier = Verifier::new(targets, options);
        let disk = OpenOptions::new().read(true).write(true).open(&file)?;
        let mut old = vec![0; 4096];
        // Two loads, so that block 0 has content that was overwritten since.
        for round in 0..2 {
            let running = verifier.start();
            running.wait_progress(3000, LIMIT)?;
            running.stop()?;
            verifier.verify().context("before anything was damaged")?;
            if round == 0 {
                disk.read_exact_at(&mut old, 0)?;
            }
        }
        damage(&disk, &old)?;
        let finding = verifier.verify();
        assert!(finding.is_err(), "{name}: not found");
        drop(server);
    }
    Ok(())
}
