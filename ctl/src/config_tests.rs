//! Properties of `node.toml`: what is written is read as it was, a bad value is refused with its line and key,
//! and no text, however wrong, panics.

use std::fmt::Write;
use std::net::IpAddr;

use proptest::collection::{btree_map, btree_set, vec};
use proptest::option;
use proptest::prelude::*;

use super::*;

const FILE: &str = "/srv/n1/node.toml";

fn name() -> impl Strategy<Value = String> {
    "[A-Za-z0-9_][A-Za-z0-9._-]{0,63}"
}

fn addr() -> impl Strategy<Value = SocketAddr> {
    (any::<IpAddr>(), 1u16..).prop_map(SocketAddr::from)
}

fn kind() -> impl Strategy<Value = Kind> {
    prop_oneof![Just(Kind::Data), Just(Kind::Witness)]
}

/// Relative and absolute, short enough for a socket.
fn path() -> impl Strategy<Value = PathBuf> {
    "/?[a-z\u{e4} .\"'#=\\\\-]{1,8}(/[a-z0-9.]{1,8}){0,2}".prop_map(PathBuf::from)
}

fn founders() -> impl Strategy<Value = Vec<FounderConfig>> {
    let rest = (kind(), addr(), addr(), any::<String>());
    let ids = btree_set(1u64.., 1..=5);
    (ids, btree_set(name(), 5), vec(rest, 5)).prop_map(|(ids, names, rest)| {
        let parts = ids.into_iter().zip(names).zip(rest);
        parts
            .map(|((id, name), (kind, control, peer, nbd))| FounderConfig {
                id: NodeId(id),
                name,
                kind,
                control,
                peer,
                nbd,
            })
            .collect()
    })
}

fn timing() -> impl Strategy<Value = Timing> {
    let lease_and_renew = (100u64..=60_000).prop_flat_map(|lease| (Just(lease), 10..=lease / 2));
    let election = (20u64..600_000).prop_flat_map(|low| (10..=low / 2, Just(low), low + 1..=600_000));
    (lease_and_renew, election).prop_map(|((lease, renew), (heartbeat, low, high))| Timing {
        lease: Duration::from_millis(lease),
        renew: Duration::from_millis(renew),
        heartbeat: Duration::from_millis(heartbeat),
        election: (Duration::from_millis(low), Duration::from_millis(high)),
    })
}

fn nbd() -> impl Strategy<Value = NbdLimits> {
    let connections = (1usize..=65536).prop_flat_map(|all| (Just(all), 1..=all));
    (connections, 1u64..=600, option::of(10u64..=604_800)).prop_map(|((all, per_client), handshake, idle)| {
        NbdLimits {
            connections: ConnectionLimits { all, per_client },
            handshake_timeout: Duration::from_secs(handshake),
            idle_timeout: idle.map(Duration::from_secs),
        }
    })
}

fn volumes() -> impl Strategy<Value = BTreeMap<String, VolumePaths>> {
    let paths = (option::of(path()), option::of(path())).prop_map(|(data, meta)| VolumePaths { data, meta });
    btree_map(any::<String>(), paths, 0..3)
}

/// A config with the paths as they are to be written.
fn config() -> impl Strategy<Value = NodeConfig> {
    let listen = (addr(), addr(), option::of(addr()), path(), path());
    let limits = (timing(), nbd());
    (founders(), any::<prop::sample::Index>(), path(), listen, limits, volumes()).prop_map(
        |(founders, me, dir, (control, peer, nbd_tcp, nbd_unix, admin), (timing, nbd), volumes)| {
            let me = me.get(&founders).clone();
            NodeConfig {
                file: FILE.into(),
                id: me.id,
                name: me.name,
                kind: me.kind,
                dir,
                control,
                peer,
                nbd_tcp,
                nbd_unix,
                admin,
                timing,
                nbd,
                founders,
                volumes,
            }
        },
    )
}

/// A string of TOML on one line, whatever is in it: as in JSON, which lets one more character stand as it is.
fn quoted(text: &str) -> String {
    serde_json::to_string(text).unwrap().replace('\u{7f}', "\\u007F")
}

fn quoted_path(path: &Path) -> String {
    quoted(path.to_str().unwrap())
}

/// The lines of the file; founders in the opposite order.
fn written(config: &NodeConfig) -> Vec<String> {
    let mut text = String::new();
    let (id, dir, kind) = (config.id.0, quoted_path(&config.dir), quoted(config.kind.word()));
    writeln!(text, "[node]\nid = {id}\nname = {}\nkind = {kind}\ndir = {dir}", quoted(&config.name)).unwrap();
    writeln!(text, "[listen]\ncontrol = \"{}\"\npeer = \"{}\"", config.control, config.peer).unwrap();
    if let Some(tcp) = config.nbd_tcp {
        writeln!(text, "nbd_tcp = \"{tcp}\"").unwrap();
    }
    writeln!(text, "nbd_unix = {}", quoted_path(&config.nbd_unix)).unwrap();
    writeln!(text, "admin = {}\n[timing]", quoted_path(&config.admin)).unwrap();
    let Timing { lease, renew, heartbeat, election: (low, high) } = config.timing;
    let times = [("lease", lease), ("renew", renew), ("heartbeat", heartbeat)];
    for (key, time) in times.into_iter().chain([("election_min", low), ("election_max", high)]) {
        writeln!(text, "{key}_ms = {}", time.as_millis()).unwrap();
    }
    let NbdLimits { connections, handshake_timeout, idle_timeout } = config.nbd;
    writeln!(text, "[nbd]\nconnections_max = {}", connections.all).unwrap();
    writeln!(text, "connections_per_client_max = {}", connections.per_client).unwrap();
    writeln!(text, "handshake_timeout_s = {}", handshake_timeout.as_secs()).unwrap();
    writeln!(text, "idle_timeout_s = {}", idle_timeout.map_or(0, |time| time.as_secs())).unwrap();
    for f in config.founders.iter().rev() {
        let (id, name, kind, nbd) = (f.id.0, quoted(&f.name), quoted(f.kind.word()), quoted(&f.nbd));
        writeln!(text, "[[cluster]]\nid = {id}\nname = {name}\nkind = {kind}").unwrap();
        writeln!(text, "control = \"{}\"\npeer = \"{}\"\nnbd = {nbd}", f.control, f.peer).unwrap();
    }
    for (name, paths) in &config.volumes {
        writeln!(text, "[volume.{}]", quoted(name)).unwrap();
        let both = [("data", &paths.data), ("meta", &paths.meta)];
        for (key, path) in both.into_iter().filter_map(|(key, path)| Some((key, path.as_ref()?))) {
            writeln!(text, "{key} = {}", quoted_path(path)).unwrap();
        }
    }
    text.lines().map(str::to_string).collect()
}

/// The config that reading gives: paths start from the directory of the file.
fn absolute(mut config: NodeConfig) -> NodeConfig {
    let at = |path: &PathBuf| Path::new("/srv/n1").join(path);
    for path in [&mut config.dir, &mut config.nbd_unix, &mut config.admin] {
        *path = at(path);
    }
    for paths in config.volumes.values_mut() {
        paths.data = paths.data.as_ref().map(at);
        paths.meta = paths.meta.as_ref().map(at);
    }
    config
}

fn parse_lines(lines: &[String]) -> Result<NodeConfig, ConfigError> {
    parse(Path::new(FILE), &lines.join("\n"))
}

/// Values that no key of this name takes, as they are written.
fn bad_values(key: &str) -> &'static [&'static str] {
    match key {
        "id" => &["0", "-1", "1.5", "'x'", "18446744073709551616", "[]"],
        "name" => &["''", "'.x'", "'-x'", "'a/b'", "'a b'", "7", "'\u{fc}'"],
        "kind" => &["'arbiter'", "'Data'", "1", "''"],
        "control" | "peer" | "nbd_tcp" => &["'localhost:1'", "'1.2.3.4'", "'1.2.3.4:0'", "'::1:70000'", "5"],
        "nbd_unix" | "admin" => &["1", "[]", "false"],
        "dir" | "data" | "meta" | "nbd" => &["1", "[]", "1979-05-27"],
        "idle_timeout_s" => &["9", "604801", "-1", "'60'", "60.5"],
        _ if key.ends_with("_max") || key.ends_with("_s") => &["0", "-1", "65537", "'1'", "1.5"],
        _ if key.ends_with("_ms") => &["9", "0", "-1", "600001", "'100'", "1e3"],
        _ => panic!("no such key: {key}"),
    }
}

/// What the error has to say of line `at`, from 0: its number, or for a value of the wrong type the line itself.
fn says_where(error: &ConfigError, at: usize, key: &str) -> bool {
    let text = error.to_string();
    match error {
        ConfigError::Value { line, key: named, .. } => *line == at + 1 && named.ends_with(&format!(".{key}")),
        _ => text.contains(&format!("line {},", at + 1)) && text.contains(key),
    }
}

proptest! {
    #[test]
    fn a_config_that_was_written_is_read_as_it_was(config in config()) {
        let lines = written(&config);
        let read = parse_lines(&lines);
        prop_assert!(read.is_ok(), "{}\n{}", read.unwrap_err(), lines.join("\n"));
        prop_assert_eq!(read.unwrap(), absolute(config));
    }

    #[test]
    fn a_bad_value_is_refused_with_its_line_and_key(
        config in config(), line in any::<prop::sample::Index>(), value in any::<prop::sample::Index>(),
    ) {
        let mut lines = written(&config);
        let keys: Vec<usize> = (0..lines.len()).filter(|&at| !lines[at].starts_with('[')).collect();
        let at = *line.get(&keys);
        let key = lines[at].split_once(" = ").unwrap().0.to_string();
        lines[at] = format!("{key} = {}", value.get(bad_values(&key)));
        let error = parse_lines(&lines).unwrap_err();
        prop_assert!(says_where(&error, at, &key), "{}, but it was line {}: {}", error, at + 1, lines[at]);
    }

    #[test]
    fn a_key_that_nobody_knows_is_refused_with_its_line(
        config in config(), at in any::<prop::sample::Index>(), key in "[a-z]{1,5}_[a-z]{1,5}_x",
    ) {
        let mut lines = written(&config);
        // Behind the last volume's header any name would be one.
        let at = 1 + at.index(lines.len());
        lines.insert(at, format!("{key} = 1"));
        let error = parse_lines(&lines).unwrap_err();
        prop_assert!(says_where(&error, at, &key), "{}", error);
    }

    #[test]
    fn a_key_that_is_missing_is_named(config in config(), line in any::<prop::sample::Index>()) {
        let mut lines = written(&config);
        let needed = ["id", "name", "kind", "control", "peer"];
        let key = |line: &String| needed.into_iter().find(|key| line.starts_with(&format!("{key} = ")));
        let keys: Vec<usize> = (0..lines.len()).filter(|&at| key(&lines[at]).is_some()).collect();
        let removed = lines.remove(*line.get(&keys));
        let error = parse_lines(&lines).unwrap_err().to_string();
        prop_assert!(error.contains(&format!("`{}`", key(&removed).unwrap())), "{}", error);
    }

    #[test]
    fn any_text_is_read_or_refused_by_the_file_s_name(text in any::<String>()) {
        if let Err(error) = parse(Path::new(FILE), &text) {
            prop_assert!(error.to_string().contains(FILE), "{}", error);
        }
    }

    #[test]
    fn a_file_with_a_piece_of_another_is_read_or_refused_by_the_file_s_name(
        config in config(), from in any::<prop::sample::Index>(), piece in "[\\[\\]a-z_ =\"'.0-9\n-]{0,12}",
        gone in 0usize..8,
    ) {
        let mut text: Vec<char> = written(&config).join("\n").chars().collect();
        let from = from.index(text.len());
        let to = text.len().min(from + gone);
        text.splice(from..to, piece.chars());
        if let Err(error) = parse(Path::new(FILE), &text.iter().collect::<String>()) {
            prop_assert!(error.to_string().contains(FILE), "{}", error);
        }
    }

    #[test]
    fn a_name_is_allowed_if_it_is_one_plain_file_name(text in "[a-zA-Z0-9._/ \u{fc}-]{0,3}|.{0,70}") {
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        let starts = text.chars().next().is_some_and(|c| plain(c) && !"-.".contains(c));
        prop_assert_eq!(check_name(&text).is_ok(), starts && text.len() <= 64 && text.chars().all(plain));
    }
}
