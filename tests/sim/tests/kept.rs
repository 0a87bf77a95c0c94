//! Scenarios that found something once stay clean, and runs are the same each time.

use std::path::Path;

use blkrepl_sim::{FaultKind, FaultSet, Options, Scenario, run};

fn scenarios() -> Vec<Scenario> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds");
    let listed = std::fs::read_dir(&dir).expect("the kept scenarios are beside this file");
    let mut files: Vec<_> = listed.flatten().map(|entry| entry.path()).collect();
    files.sort();
    let mut found = Vec::new();
    for file in files {
        let text = std::fs::read_to_string(&file).expect("a kept file is text");
        for line in text.lines().filter(|l| !l.trim().is_empty() && !l.starts_with('#')) {
            found.push(line.parse().unwrap_or_else(|e| panic!("{line}: {e}")));
        }
    }
    found
}

#[test]
fn kept_scenarios_are_clean() {
    let scenarios = scenarios();
    assert!(scenarios.len() > 5);
    for scenario in scenarios {
        let outcome = run(scenario.seed, &scenario.options);
        assert!(outcome.is_clean(), "{scenario}: {:?}", outcome.violation);
    }
}

#[test]
fn a_seed_is_the_same_run_each_time_with_and_without_a_trace() {
    for seed in 1..6 {
        let quiet = run(seed, &Options { ops: 200, ..Options::default() });
        let traced = Options { ops: 200, trace: true, ..Options::default() };
        let (one, two) = (run(seed, &traced), run(seed, &traced));
        assert_eq!(quiet.hash, one.hash, "seed {seed}");
        assert_eq!(one.trace, two.trace, "seed {seed}");
        assert!(!one.trace.is_empty() && quiet.trace.is_empty());
    }
}

#[test]
fn without_faults_every_operation_is_answered() {
    for seed in 1..10 {
        let outcome = run(seed, &Options { ops: 300, faults: FaultSet::NONE, ..Options::default() });
        assert!(outcome.is_clean(), "seed {seed}: {:?}", outcome.violation);
        assert!(
            outcome.stats.answered >= 300 && outcome.stats.unknown == 0,
            "seed {seed}: {:?}",
            outcome.stats
        );
    }
}

#[test]
fn a_kind_that_is_asked_for_strikes() {
    let always = FaultSet::of(&[FaultKind::Crash]);
    let options = Options { ops: 200, faults: FaultSet::NONE, always, ..Options::default() };
    let outcome = run(3, &options);
    assert!(outcome.is_clean(), "{:?}", outcome.violation);
    assert!(outcome.stats.faults.contains_key(&FaultKind::Crash));
    // And is left out by its number.
    let numbers = outcome.strikes.iter().map(|(number, ..)| *number);
    let skipped = run(3, &Options { skip: numbers.collect(), ..options });
    assert!(skipped.stats.faults.is_empty());
}
