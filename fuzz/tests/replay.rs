//! Runs every target on stable Rust, without instrumentation: over its corpus, then over random changes of
//! the seeds, for a bounded time. An input that makes a target panic is kept under `fuzz/artifacts` and
//! named in the failure.
//!
//! `BLKREPL_FUZZ_SEED` chooses another sequence of random inputs, `BLKREPL_FUZZ_SECONDS` how long each target
//! goes on (without it at most [`INPUTS`] inputs and [`TIME_MAX`]).

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use blkrepl_fuzz::mutate::Rng;
use blkrepl_fuzz::{TARGETS, Target, Verdict, seeds};

const INPUTS: u64 = 5000;
const TIME_MAX: Duration = Duration::from_secs(8);

fn dir(of: &str, target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(of).join(target)
}

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable} takes a number, not '{text}'")))
}

fn target(name: &str) -> Target {
    TARGETS.iter().find(|(known, _)| *known == name).unwrap_or_else(|| panic!("no target {name}")).1
}

/// Every file of the corpus, those that libFuzzer found included.
fn corpus(name: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let mut dirs = vec![dir("corpus", name)];
    let mut files = Vec::new();
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display())) {
            let path = entry.expect("an entry of the corpus").path();
            if path.is_dir() {
                dirs.push(path);
            } else {
                let bytes = fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
                files.push((path, bytes));
            }
        }
    }
    files.sort();
    files
}

fn panics(target: Target, input: &[u8]) -> bool {
    catch_unwind(AssertUnwindSafe(|| target(input))).is_err()
}

fn run(name: &str) {
    let target = target(name);
    let files = corpus(name);
    assert!(files.len() >= 3, "only {} files in the corpus of {name}", files.len());
    for (path, bytes) in &files {
        assert!(!panics(target, bytes), "{name} panics on {}", path.display());
    }
    let seed = number("BLKREPL_FUZZ_SEED").unwrap_or(0xb10c);
    let seconds = number("BLKREPL_FUZZ_SECONDS").map(Duration::from_secs);
    let inputs: Vec<Vec<u8>> = files.into_iter().map(|(_, bytes)| bytes).collect();
    let (mut rng, started, mut done, mut accepted) = (Rng::new(seed), Instant::now(), 0_u64, 0_u64);
    while started.elapsed() < seconds.unwrap_or(TIME_MAX) && (seconds.is_some() || done < INPUTS) {
        let input = rng.input(&inputs);
        match catch_unwind(AssertUnwindSafe(|| target(&input))) {
            Ok(verdict) => accepted += u64::from(verdict == Verdict::Accepted),
            Err(_) => {
                let kept = dir("artifacts", name).join(format!("random-{seed}-{done}"));
                fs::create_dir_all(dir("artifacts", name)).expect("a directory for the input");
                fs::write(&kept, &input).expect("the input is kept");
                panic!("{name} panics on random input {done} of seed {seed}, kept as {}", kept.display());
            }
        }
        done += 1;
    }
    println!("{name}: {done} random inputs, {accepted} accepted, in {:?}", started.elapsed());
    // Else the targets no longer reach what they are for.
    assert!(accepted > 0, "no random input of {done} was accepted");
}

#[test]
fn nbd_negotiation() {
    run("nbd_negotiation");
}

#[test]
fn nbd_requests() {
    run("nbd_requests");
}

#[test]
fn peer_frame() {
    run("peer_frame");
}

#[test]
fn hello() {
    run("hello");
}

/// Whatever the two copies hold, what is read of them can be written again [R16].
#[test]
fn superblock_pair() {
    run("superblock_pair");
}

#[test]
fn metadata_pages() {
    run("metadata_pages");
}

#[test]
fn control_codec() {
    run("control_codec");
}

#[test]
fn config() {
    run("config");
}

#[test]
fn the_corpus_holds_the_seeds_and_they_are_judged_as_they_are_named() {
    for (name, target) in TARGETS {
        let seeds = seeds::of(name);
        assert!(seeds.iter().any(|(seed, _)| !seed.starts_with("refused-")));
        for (seed, bytes) in seeds {
            let path = dir("corpus", name).join(seed);
            let kept = fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            assert!(kept == bytes, "{} is out of date: run the example `seeds`", path.display());
            let expected = if seed.starts_with("refused-") { Verdict::Refused } else { Verdict::Accepted };
            assert_eq!(target(&bytes), expected, "{name}/{seed}");
        }
    }
}

#[test]
fn every_target_is_declared_and_has_a_test_of_its_own() {
    let manifest = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml")).unwrap();
    for (name, _) in TARGETS {
        assert!(manifest.contains(&format!("fuzz_targets/{name}.rs")), "{name} is not in Cargo.toml");
        assert!(include_str!("replay.rs").contains(&format!("run(\"{name}\")")), "{name} has no test");
    }
}
