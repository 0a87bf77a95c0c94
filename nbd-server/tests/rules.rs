//! The table of the specification's rules in `docs/nbd.md` names tests; they are there.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::fs;
use std::path::Path;

/// All Rust sources below a directory, one after the other.
fn sources(dir: &Path) -> String {
    let mut text = String::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            text.push_str(&sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            text.push_str(&fs::read_to_string(&path).unwrap());
        }
    }
    text
}

#[test]
fn the_tests_that_the_rules_name_exist() {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let document = fs::read_to_string(package.join("../docs/nbd.md")).unwrap();
    let (_, rules) = document.split_once("\n## Rules of the specification\n").unwrap();
    let dirs = ["src", "tests", "../engine/src", "../tests/tests"].map(|dir| package.join(dir));
    let text: String = dirs.iter().map(|dir| sources(dir)).collect();
    let mut named = 0;
    for row in rules.lines().filter(|line| line.starts_with("| ")) {
        let shown_by = row.trim_end_matches(" |").rsplit(" | ").next().unwrap();
        for test in shown_by.split('`').skip(1).step_by(2) {
            assert!(text.contains(&format!("fn {test}(")), "no test {test}, which shows: {row}");
            named += 1;
        }
    }
    assert!(named > 70, "{named} tests are named");
}
