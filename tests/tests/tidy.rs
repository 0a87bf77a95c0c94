//! Rules that a reader would otherwise have to enforce: form of the sources, purity of the sans-IO
//! core, the fixed top level, and that each rule tag of the design is named by a test.
//!
//! Plain text checks without a parser; they read the work tree and change nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use blkrepl_tests::binary::workspace;

const LINE_MAX: usize = 120;
const FILE_LINES_MAX: usize = 900;
const FN_LINES_MAX: usize = 100;
/// The design's rules are [R1] to [R27].
const TAGS: std::ops::RangeInclusive<u8> = 1..=27;

/// Words that must not stand in sources and documents: unfinished work, and synonyms of the design's
/// words. Spelled in two halves, so that this list does not find itself.
const BANNED: [(&str, &str); 9] = [
    ("TO", "DO"),
    ("FIX", "ME"),
    ("XX", "X"),
    ("for ", "now"),
    ("dbg", "!("),
    ("todo", "!("),
    ("unimplemented", "!("),
    ("ma", "ster"),
    ("sla", "ve"),
];

/// What the sans-IO core must not name.
const IMPURE: [&str; 16] = [
    "std::net",
    "std::fs",
    "std::thread",
    "std::os",
    "std::env",
    "std::process",
    "Instant",
    "SystemTime",
    "tokio",
    "io_uring",
    "libc::",
    "rustix",
    "HashMap",
    "HashSet",
    "rand::",
    "async fn",
];

struct Source {
    path: PathBuf,
    text: String,
}

impl Source {
    fn name(&self) -> String {
        self.path.strip_prefix(workspace()).unwrap_or(&self.path).display().to_string()
    }

    fn is_rust(&self) -> bool {
        self.path.extension().is_some_and(|e| e == "rs")
    }

    fn is_test_file(&self) -> bool {
        let name = self.name();
        let parts: Vec<&str> = name.trim_end_matches(".rs").split('/').collect();
        let test = |part: &&str| {
            *part == "tests" || *part == "testing" || part.ends_with("_test") || part.ends_with("_tests")
        };
        parts.iter().any(test) || parts.first() == Some(&"benches")
    }

    /// Lines before the trailing test module.
    fn production(&self) -> impl Iterator<Item = (usize, &str)> {
        let end = self.text.find("\n#[cfg(test)]\nmod ").unwrap_or(self.text.len());
        self.text[..end].lines().enumerate().map(|(index, line)| (index + 1, line))
    }
}

fn sources() -> Vec<Source> {
    let mut found = Vec::new();
    collect(workspace(), &mut found);
    assert!(found.len() > 20, "only {} files found under {}", found.len(), workspace().display());
    found
}

fn collect(dir: &Path, found: &mut Vec<Source>) {
    let listed = fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    let mut entries: Vec<PathBuf> = listed.flatten().map(|entry| entry.path()).collect();
    entries.sort();
    for path in entries {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if path.is_dir() {
            if !["target", ".git", "corpus", "artifacts", "node_modules"].contains(&name.as_str()) {
                collect(&path, found);
            }
        } else if ["rs", "md", "toml", "sh"].iter().any(|e| path.extension().is_some_and(|x| x == *e))
            || ["run", "coverage"].contains(&name.as_str())
        {
            let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            found.push(Source { path, text });
        }
    }
}

fn report(findings: &[String]) {
    assert!(findings.is_empty(), "{} findings:\n{}", findings.len(), findings.join("\n"));
}

#[test]
fn sources_have_the_agreed_form() {
    let mut findings = Vec::new();
    for source in sources() {
        let name = source.name();
        let lines = source.text.lines().count();
        if source.is_rust() && lines > FILE_LINES_MAX {
            findings.push(format!("{name}: {lines} lines, at most {FILE_LINES_MAX}"));
        }
        if source.is_rust() && !source.text.starts_with("//!") {
            findings.push(format!("{name}: no module head (//!) that says what it is for"));
        }
        if !source.text.is_empty() && !source.text.ends_with('\n') {
            findings.push(format!("{name}: no newline at the end"));
        }
        for (index, line) in source.text.lines().enumerate() {
            let at = format!("{name}:{}", index + 1);
            if !line.is_ascii() {
                findings.push(format!("{at}: not ASCII: {line}"));
            }
            let markdown = source.path.extension().is_some_and(|e| e == "md");
            if line.len() > LINE_MAX && !markdown {
                findings.push(format!("{at}: {} bytes long, at most {LINE_MAX}", line.len()));
            }
            if line.ends_with([' ', '\t']) || (source.is_rust() && line.contains('\t')) {
                findings.push(format!("{at}: blank at the end, or a tab"));
            }
        }
    }
    report(&findings);
}

#[test]
fn no_banned_words() {
    let mut findings = Vec::new();
    for source in sources() {
        for (index, line) in source.text.lines().enumerate() {
            for (head, tail) in BANNED {
                if has_word(line, &format!("{head}{tail}")) {
                    findings.push(format!("{}:{}: {head}{tail}: {line}", source.name(), index + 1));
                }
            }
        }
    }
    report(&findings);
}

/// True if `word` stands in `line`, not as a part of a longer word.
fn has_word(line: &str, word: &str) -> bool {
    let letter = |c: char| c.is_ascii_alphanumeric();
    line.match_indices(word).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        let after = line[at + word.len()..].chars().next();
        let closed = word.ends_with('(') || !after.is_some_and(letter);
        !before.is_some_and(letter) && closed
    })
}

#[test]
fn functions_are_short() {
    let mut findings = Vec::new();
    for source in sources().iter().filter(|s| s.is_rust() && !s.is_test_file()) {
        let lines: Vec<(usize, &str)> = source.production().collect();
        for (index, (number, line)) in lines.iter().enumerate() {
            let Some(indent) = function_indent(line) else { continue };
            let end = format!("{}}}", " ".repeat(indent));
            let length = lines[index..].iter().position(|(_, l)| *l == end).unwrap_or(0) + 1;
            if length > FN_LINES_MAX {
                findings.push(format!("{}:{number}: {length} lines, at most {FN_LINES_MAX}", source.name()));
            }
        }
    }
    report(&findings);
}

/// Columns before a line that begins a function; none for other lines.
fn function_indent(line: &str) -> Option<usize> {
    let code = line.trim_start();
    let mut words = code.split(' ').skip_while(|w| {
        w.starts_with("pub") || ["async", "const", "unsafe", "extern", "in", "\"C\""].contains(w)
    });
    (words.next() == Some("fn") && !code.ends_with(';') && !code.ends_with('}'))
        .then_some(line.len() - code.len())
}

/// The core is free of any clock, socket, file, thread or chance, so that a simulator can run it.
#[test]
fn the_core_is_sans_io() {
    let mut findings = Vec::new();
    let core = ["engine/src/replica/", "engine/src/meta/", "engine/src/wire/", "engine/src/types/"];
    for source in sources() {
        let name = source.name();
        if !core.iter().any(|dir| name.starts_with(dir)) || !source.is_rust() || source.is_test_file() {
            continue;
        }
        for (number, line) in source.production() {
            let code = line.split("//").next().unwrap_or_default();
            for word in IMPURE.iter().filter(|word| code.contains(**word)) {
                findings.push(format!("{name}:{number}: {word}: {}", line.trim()));
            }
        }
    }
    report(&findings);
}

#[test]
fn unsafe_code_stays_where_it_is_explained() {
    let allowed = [
        "engine/src/reactor/",
        "ctl/src/listen_fds.rs",
        "tests/src/bin/no_io_uring.rs",
        "benches/src/floor/",
        "benches/src/ways/ring.rs",
    ];
    let mut findings = Vec::new();
    for source in sources().iter().filter(|s| s.is_rust()) {
        let name = source.name();
        if allowed.iter().any(|prefix| name.starts_with(prefix)) {
            continue;
        }
        for (index, line) in source.text.lines().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            if code.contains("unsafe {") || code.contains("unsafe fn") || code.contains("unsafe impl") {
                // Quoted, as in the line above, it is text.
                if !code.contains('"') {
                    findings.push(format!("{name}:{}: {}", index + 1, line.trim()));
                }
            }
        }
    }
    report(&findings);
}

#[test]
fn every_rule_tag_is_named_by_a_test() {
    let mut named: BTreeMap<u8, Vec<String>> = BTreeMap::new();
    // This file names tags as examples.
    for source in sources().iter().filter(|s| s.is_rust() && !s.name().ends_with("tidy.rs")) {
        for (function, text) in test_functions(&source.text) {
            for tag in tags_in(&text).into_iter().chain(tags_in_name(&function)) {
                named.entry(tag).or_default().push(format!("{}::{function}", source.name()));
            }
        }
    }
    let missing: Vec<String> =
        TAGS.filter(|tag| !named.contains_key(tag)).map(|tag| format!("[R{tag}]")).collect();
    assert!(missing.is_empty(), "no test names {}", missing.join(" "));
    let unknown: Vec<_> = named.iter().filter(|(tag, _)| !TAGS.contains(tag)).collect();
    assert!(unknown.is_empty(), "tags that the design does not know: {unknown:?}");
}

/// Each test function with the comments and attributes before it.
fn test_functions(text: &str) -> Vec<(String, String)> {
    let lines: Vec<&str> = text.lines().collect();
    let mut found = Vec::new();
    for (index, line) in lines.iter().enumerate() {
        let attribute = line.trim_start();
        if !attribute.starts_with("#[test]") && !attribute.starts_with("#[tokio::test") {
            continue;
        }
        let is_head = |l: &&str| l.trim_start().starts_with("//") || l.trim_start().starts_with("#[");
        let first = index - lines[..index].iter().rev().take_while(|l| is_head(l)).count();
        let Some(head) = lines[index..].iter().position(|l| has_word(l, "fn")) else { continue };
        let head = index + head;
        let indent = lines[head].len() - lines[head].trim_start().len();
        let end = format!("{}}}", " ".repeat(indent));
        let last = lines[head..].iter().position(|l| **l == end).map_or(lines.len(), |p| head + p + 1);
        let after = lines[head].split("fn ").nth(1).unwrap_or_default();
        let name = after.split(['(', '<']).next().unwrap_or_default().to_owned();
        found.push((name, lines[first..last].join("\n")));
    }
    found
}

/// Numbers of tags such as `[R7]` or `[R2, R10]`.
fn tags_in(text: &str) -> BTreeSet<u8> {
    let mut tags = BTreeSet::new();
    for (at, _) in text.match_indices("[R") {
        let Some(inner) = text[at + 1..].split(']').next() else { continue };
        let parsed: Option<Vec<u8>> =
            inner.split(',').map(|part| part.trim().strip_prefix('R')?.parse().ok()).collect();
        tags.extend(parsed.unwrap_or_default());
    }
    tags
}

/// Tags in a function's name, such as `r12_marks_the_missing`.
fn tags_in_name(name: &str) -> BTreeSet<u8> {
    name.split('_').filter_map(|part| part.strip_prefix('r')?.parse().ok()).collect()
}

#[test]
fn tags_are_found_in_names_comments_and_bodies() {
    let text = "    /// Closes [R3].\n    #[test]\n    fn r12_and_more() {\n        // [R2, R10]\n    }\n\n\
                fn other() {} // [R9]\n";
    let found = test_functions(text);
    assert_eq!(found.len(), 1);
    assert_eq!(tags_in(&found[0].1), BTreeSet::from([2, 3, 10]));
    assert_eq!(tags_in_name(&found[0].0), BTreeSet::from([12]));
}

#[test]
fn the_top_level_is_the_agreed_one() {
    let agreed = [
        "Cargo.toml",
        "Cargo.lock",
        "engine",
        "nbd-server",
        "ctl",
        "benches",
        "fuzz",
        "tests",
        "docs",
        "README.md",
        "LICENSE-MIT",
        "LICENSE-APACHE",
        "deny.toml",
        "target",
    ];
    let found: Vec<String> = fs::read_dir(workspace())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .filter(|name| !name.starts_with('.') && !agreed.contains(&name.as_str()))
        .collect();
    assert!(found.is_empty(), "not agreed at the top level: {found:?}");
}

#[test]
fn links_between_documents_resolve() {
    let mut findings = Vec::new();
    for source in sources().iter().filter(|s| s.path.extension().is_some_and(|e| e == "md")) {
        for piece in source.text.split("](").skip(1) {
            let target = piece.split(')').next().unwrap_or_default();
            let file = target.split('#').next().unwrap_or_default();
            if file.is_empty() || target.contains("://") {
                continue;
            }
            let base = source.path.parent().unwrap_or(workspace());
            if !base.join(file).exists() {
                findings.push(format!("{}: link to {file}, which does not exist", source.name()));
            }
        }
    }
    report(&findings);
}
