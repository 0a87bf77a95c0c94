//! `node.toml`: the configuration of one node's process.
//!
//! Reads and checks; never writes, opens no socket and no other file. Unknown keys are refused. Every
//! error names the file, the line, the key, and what is allowed. What a [`NodeConfig`] holds is
//! consistent: the node is one of the founders, ids and names are unique, times stand in the right
//! order. The cluster list forms a new cluster only; once there is one, cluster state rules.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use blkrepl_engine::types::NodeId;
use blkrepl_nbd::{ConnectionLimits, ServerOptions};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use toml::Spanned;

/// Lease length of a new cluster, in milliseconds.
pub const LEASE_MS_DEFAULT: u64 = 1500;
/// Time between two lease renewals, in milliseconds.
pub const RENEW_MS_DEFAULT: u64 = 400;
/// Time between two Raft heartbeats, in milliseconds.
pub const HEARTBEAT_MS_DEFAULT: u64 = 100;
/// Shortest election timeout, in milliseconds.
pub const ELECTION_MIN_MS_DEFAULT: u64 = 400;
/// Longest election timeout, in milliseconds.
pub const ELECTION_MAX_MS_DEFAULT: u64 = 800;
/// Longest path of a unix socket that Linux takes, in bytes.
pub const UNIX_PATH_MAX: usize = 107;
/// Longest name of a node or volume, in bytes.
pub const NAME_BYTES_MAX: usize = 64;

/// Why a config file is refused.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read config file {path}: {source}; give the path of a node.toml with --config")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Not TOML, an unknown key, a missing key, or a value of the wrong type.
    #[error("config file {path}: {message}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Line, key and what is allowed.
        message: String,
    },
    /// A value breaks a rule.
    #[error("config file {path}, line {line}, key {key}: {problem}")]
    Value {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// The key.
        key: String,
        /// What is wrong and what is allowed.
        problem: String,
    },
}

/// What a node is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Votes and holds replicas.
    Data,
    /// Votes only.
    Witness,
}

impl Kind {
    /// The word used in config and output.
    pub fn word(self) -> &'static str {
        match self {
            Self::Data => "data",
            Self::Witness => "witness",
        }
    }
}

/// A founder of the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FounderConfig {
    /// Id.
    pub id: NodeId,
    /// Name.
    pub name: String,
    /// Kind.
    pub kind: Kind,
    /// Where its control plane listens.
    pub control: SocketAddr,
    /// Where its replicas listen for peers.
    pub peer: SocketAddr,
    /// NBD address shown to clients that ask the wrong node.
    pub nbd: String,
}

/// Paths of one volume's files, where they differ from `DIR/NAME.data` and `DIR/NAME.meta`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumePaths {
    /// Data file or block device.
    pub data: Option<PathBuf>,
    /// Metadata file.
    pub meta: Option<PathBuf>,
}

/// Times of the control plane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// Lease length of a new cluster.
    pub lease: Duration,
    /// Time between renewals.
    pub renew: Duration,
    /// Time between Raft heartbeats.
    pub heartbeat: Duration,
    /// Shortest and longest election timeout.
    pub election: (Duration, Duration),
}

/// Limits on NBD clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NbdLimits {
    /// Most connections.
    pub connections: ConnectionLimits,
    /// Longest time of a handshake.
    pub handshake_timeout: Duration,
    /// How long a connection may ask nothing; `None`: for ever.
    pub idle_timeout: Option<Duration>,
}

/// The whole of `node.toml`, checked, with absolute paths.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeConfig {
    /// The file it was read from.
    pub file: PathBuf,
    /// This node.
    pub id: NodeId,
    /// Its name.
    pub name: String,
    /// Its kind.
    pub kind: Kind,
    /// Where it keeps its state.
    pub dir: PathBuf,
    /// Control plane address.
    pub control: SocketAddr,
    /// Peer address.
    pub peer: SocketAddr,
    /// NBD over TCP; `None`: not served.
    pub nbd_tcp: Option<SocketAddr>,
    /// NBD over a unix socket.
    pub nbd_unix: PathBuf,
    /// Admin socket.
    pub admin: PathBuf,
    /// Times.
    pub timing: Timing,
    /// Limits on NBD clients.
    pub nbd: NbdLimits,
    /// Founders, by id.
    pub founders: Vec<FounderConfig>,
    /// Paths of volumes.
    pub volumes: BTreeMap<String, VolumePaths>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawConfig {
    node: RawNode,
    listen: RawListen,
    #[serde(default)]
    timing: RawTiming,
    #[serde(default)]
    nbd: RawNbd,
    cluster: Vec<RawFounder>,
    #[serde(default)]
    volume: BTreeMap<String, VolumePaths>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawNode {
    id: Spanned<u64>,
    name: Spanned<String>,
    kind: Spanned<Kind>,
    dir: Option<PathBuf>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawListen {
    control: Spanned<String>,
    peer: Spanned<String>,
    nbd_tcp: Option<Spanned<String>>,
    nbd_unix: Option<Spanned<PathBuf>>,
    admin: Option<Spanned<PathBuf>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct RawTiming {
    lease_ms: Option<Spanned<u64>>,
    renew_ms: Option<Spanned<u64>>,
    heartbeat_ms: Option<Spanned<u64>>,
    election_min_ms: Option<Spanned<u64>>,
    election_max_ms: Option<Spanned<u64>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct RawNbd {
    connections_max: Option<Spanned<u64>>,
    connections_per_client_max: Option<Spanned<u64>>,
    handshake_timeout_s: Option<Spanned<u64>>,
    idle_timeout_s: Option<Spanned<u64>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawFounder {
    id: Spanned<u64>,
    name: Spanned<String>,
    kind: Spanned<Kind>,
    control: Spanned<String>,
    peer: Spanned<String>,
    nbd: Option<String>,
}

/// Reads and checks a config file.
///
/// # Errors
/// [`ConfigError`] for the first problem found.
pub fn load(path: &Path) -> Result<NodeConfig, ConfigError> {
    let text = std::fs::read_to_string(path)
        .map_err(|source| ConfigError::Read { path: path.to_path_buf(), source })?;
    let absolute =
        std::path::absolute(path).map_err(|source| ConfigError::Read { path: path.to_path_buf(), source })?;
    parse(&absolute, &text)
}

/// Checks the text of a config file. `path` (absolute) is what relative paths in it start from.
///
/// # Errors
/// [`ConfigError`] for the first problem found.
pub fn parse(path: &Path, text: &str) -> Result<NodeConfig, ConfigError> {
    let raw: RawConfig = toml::from_str(text).map_err(|error| ConfigError::Parse {
        path: path.to_path_buf(),
        message: error.to_string().trim_end().to_string(),
    })?;
    let at = Checker { path, text };
    let base = path.parent().unwrap_or(Path::new("/"));
    let id = at.node_id("node.id", &raw.node.id)?;
    at.name("node.name", &raw.node.name)?;
    let dir = raw.node.dir.map_or_else(|| base.to_path_buf(), |dir| base.join(dir));
    let founders = at.founders(&raw.cluster)?;
    let kind = *raw.node.kind.get_ref();
    let Some(me) = founders.iter().find(|f| f.id == id) else {
        return at.refuse(
            &raw.node.id,
            "node.id",
            format!("no [[cluster]] entry has id = {}; add this node to the list", id.0),
        );
    };
    if me.name != *raw.node.name.get_ref() {
        let problem =
            format!("the [[cluster]] entry with id = {} is named '{}'; use one name", id.0, me.name);
        return at.refuse(&raw.node.name, "node.name", problem);
    }
    if me.kind != kind {
        let problem =
            format!("the [[cluster]] entry with id = {} says '{}'; use one kind", id.0, me.kind.word());
        return at.refuse(&raw.node.kind, "node.kind", problem);
    }
    let path_or = |given: &Option<Spanned<PathBuf>>, key: &str, name: &str| match given {
        Some(given) => at.socket(given, key, base.join(given.get_ref())),
        None => at.socket(&raw.node.id, key, dir.join(name)),
    };
    Ok(NodeConfig {
        file: path.to_path_buf(),
        id,
        name: raw.node.name.get_ref().clone(),
        kind,
        control: at.addr("listen.control", &raw.listen.control)?,
        peer: at.addr("listen.peer", &raw.listen.peer)?,
        nbd_tcp: raw.listen.nbd_tcp.as_ref().map(|a| at.addr("listen.nbd_tcp", a)).transpose()?,
        nbd_unix: path_or(&raw.listen.nbd_unix, "listen.nbd_unix", "nbd.sock")?,
        admin: path_or(&raw.listen.admin, "listen.admin", "admin.sock")?,
        timing: at.timing(&raw.timing)?,
        nbd: at.nbd(&raw.nbd)?,
        founders,
        volumes: raw
            .volume
            .into_iter()
            .map(|(name, p)| {
                (name, VolumePaths { data: p.data.map(|d| base.join(d)), meta: p.meta.map(|m| base.join(m)) })
            })
            .collect(),
        dir,
    })
}

impl NodeConfig {
    /// Paths of a volume's data and metadata on this node.
    pub fn volume_paths(&self, volume: &str) -> (PathBuf, PathBuf) {
        let given = self.volumes.get(volume);
        let path = |given: Option<&PathBuf>, ending: &str| {
            given.cloned().unwrap_or_else(|| self.dir.join(format!("{volume}.{ending}")))
        };
        (path(given.and_then(|v| v.data.as_ref()), "data"), path(given.and_then(|v| v.meta.as_ref()), "meta"))
    }
}

/// Says whether a name of a node or volume is allowed, and what is if not.
///
/// # Errors
/// A sentence that names the rule.
pub fn check_name(name: &str) -> Result<(), String> {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.is_empty()
        || name.len() > NAME_BYTES_MAX
        || !name.chars().all(good)
        || name.starts_with(['.', '-'])
    {
        return Err(format!(
            "'{name}' is not a name: 1 to {NAME_BYTES_MAX} of A-Z a-z 0-9 - _ . are allowed, not starting \
            with . or -"
        ));
    }
    Ok(())
}

struct Checker<'a> {
    path: &'a Path,
    text: &'a str,
}

impl Checker<'_> {
    fn refuse<T, V>(&self, at: &Spanned<V>, key: &str, problem: String) -> Result<T, ConfigError> {
        let start = at.span().start.min(self.text.len());
        let line = self.text.as_bytes()[..start].iter().filter(|&&b| b == b'\n').count() + 1;
        Err(ConfigError::Value { path: self.path.to_path_buf(), line, key: key.to_string(), problem })
    }

    fn node_id(&self, key: &str, id: &Spanned<u64>) -> Result<NodeId, ConfigError> {
        match *id.get_ref() {
            0 => self.refuse(id, key, "0 is not allowed; ids start at 1".to_string()),
            n => Ok(NodeId(n)),
        }
    }

    fn name(&self, key: &str, name: &Spanned<String>) -> Result<(), ConfigError> {
        check_name(name.get_ref()).or_else(|problem| self.refuse(name, key, problem))
    }

    fn addr(&self, key: &str, addr: &Spanned<String>) -> Result<SocketAddr, ConfigError> {
        let text = addr.get_ref();
        match text.parse::<SocketAddr>() {
            Ok(parsed) if parsed.port() != 0 => Ok(parsed),
            Ok(_) => {
                self.refuse(addr, key, format!("'{text}' has port 0; give the port that others will dial"))
            }
            Err(_) => self.refuse(
                addr,
                key,
                format!("'{text}' is not IP:PORT, such as 10.0.0.1:7100 or [fd00::1]:7100"),
            ),
        }
    }

    fn socket<V>(&self, at: &Spanned<V>, key: &str, path: PathBuf) -> Result<PathBuf, ConfigError> {
        let len = path.as_os_str().len();
        if len > UNIX_PATH_MAX {
            let problem = format!(
                "the socket path {} has {len} bytes, Linux takes {UNIX_PATH_MAX}; choose a shorter directory",
                path.display()
            );
            return self.refuse(at, key, problem);
        }
        Ok(path)
    }

    fn founders(&self, raw: &[RawFounder]) -> Result<Vec<FounderConfig>, ConfigError> {
        let (mut ids, mut names) = (BTreeSet::new(), BTreeSet::new());
        let mut founders = Vec::with_capacity(raw.len());
        for founder in raw {
            let id = self.node_id("cluster.id", &founder.id)?;
            self.name("cluster.name", &founder.name)?;
            let name = founder.name.get_ref().clone();
            if !ids.insert(id) {
                return self.refuse(
                    &founder.id,
                    "cluster.id",
                    format!("{} stands twice; ids are unique", id.0),
                );
            }
            if !names.insert(name.clone()) {
                return self.refuse(
                    &founder.name,
                    "cluster.name",
                    format!("'{name}' stands twice; names are unique"),
                );
            }
            founders.push(FounderConfig {
                id,
                name,
                kind: *founder.kind.get_ref(),
                control: self.addr("cluster.control", &founder.control)?,
                peer: self.addr("cluster.peer", &founder.peer)?,
                nbd: founder.nbd.clone().unwrap_or_default(),
            });
        }
        founders.sort_by_key(|f| f.id);
        Ok(founders)
    }

    fn nbd(&self, raw: &RawNbd) -> Result<NbdLimits, ConfigError> {
        let value = |given: &Option<Spanned<u64>>, key: &str, allowed: RangeInclusive<u64>, default: u64| {
            let Some(given) = given else { return Ok(default.min(*allowed.end())) };
            let found = *given.get_ref();
            if !allowed.contains(&found) {
                let problem = format!("{found} is not in {} to {}", allowed.start(), allowed.end());
                return self.refuse(given, key, problem);
            }
            Ok(found)
        };
        let default = ConnectionLimits::default();
        let all = value(&raw.connections_max, "nbd.connections_max", 1..=65536, default.all as u64)?;
        let key = "nbd.connections_per_client_max";
        let per_client = value(&raw.connections_per_client_max, key, 1..=all, default.per_client as u64)?;
        let key = "nbd.handshake_timeout_s";
        let default = ServerOptions::default().negotiation_timeout.as_secs();
        let handshake = value(&raw.handshake_timeout_s, key, 1..=600, default)?;
        let idle = raw.idle_timeout_s.as_ref().filter(|seconds| *seconds.get_ref() != 0);
        if let Some(given) = idle.filter(|seconds| !(10..=604_800).contains(seconds.get_ref())) {
            let problem = format!("{} is not 0 (never) or in 10 to 604800 seconds", given.get_ref());
            return self.refuse(given, "nbd.idle_timeout_s", problem);
        }
        // Both are at most 65536.
        let number = |value: u64| usize::try_from(value).unwrap_or(usize::MAX);
        Ok(NbdLimits {
            connections: ConnectionLimits { all: number(all), per_client: number(per_client) },
            handshake_timeout: Duration::from_secs(handshake),
            idle_timeout: idle.map(|seconds| Duration::from_secs(*seconds.get_ref())),
        })
    }

    fn timing(&self, raw: &RawTiming) -> Result<Timing, ConfigError> {
        let value = |given: &Option<Spanned<u64>>, key: &str, default: u64| match given {
            Some(ms) if !(10..=600_000).contains(ms.get_ref()) => {
                self.refuse(ms, key, format!("{} is not in 10 to 600000 milliseconds", ms.get_ref()))
            }
            Some(ms) => Ok(*ms.get_ref()),
            None => Ok(default),
        };
        let lease = value(&raw.lease_ms, "timing.lease_ms", LEASE_MS_DEFAULT)?;
        let renew = value(&raw.renew_ms, "timing.renew_ms", RENEW_MS_DEFAULT)?;
        let heartbeat = value(&raw.heartbeat_ms, "timing.heartbeat_ms", HEARTBEAT_MS_DEFAULT)?;
        let low = value(&raw.election_min_ms, "timing.election_min_ms", ELECTION_MIN_MS_DEFAULT)?;
        let high = value(&raw.election_max_ms, "timing.election_max_ms", ELECTION_MAX_MS_DEFAULT)?;
        let rules = [
            ((100..=60_000).contains(&lease), &raw.lease_ms, "timing.lease_ms", "between 100 and 60000"),
            (renew * 2 <= lease, &raw.renew_ms, "timing.renew_ms", "at most half of lease_ms"),
            (
                heartbeat * 2 <= low,
                &raw.heartbeat_ms,
                "timing.heartbeat_ms",
                "at most half of election_min_ms",
            ),
            (low < high, &raw.election_min_ms, "timing.election_min_ms", "less than election_max_ms"),
        ];
        for (holds, given, key, allowed) in rules {
            if !holds {
                let problem = format!(
                    "must be {allowed} (lease {lease}, renew {renew}, heartbeat {heartbeat}, election \
                    {low} to {high} ms)"
                );
                let anywhere = given.as_ref().or(raw.lease_ms.as_ref()).or(raw.election_max_ms.as_ref());
                return match anywhere {
                    Some(at) => self.refuse(at, key, problem),
                    None => self.refuse(&Spanned::new(0..0, ()), key, problem),
                };
            }
        }
        Ok(Timing {
            lease: Duration::from_millis(lease),
            renew: Duration::from_millis(renew),
            heartbeat: Duration::from_millis(heartbeat),
            election: (Duration::from_millis(low), Duration::from_millis(high)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
[node]
id = 1
name = "n1"
kind = "data"

[listen]
control = "127.0.0.1:7101"
peer = "127.0.0.1:7102"
nbd_tcp = "127.0.0.1:10809"

[[cluster]]
id = 1
name = "n1"
kind = "data"
control = "127.0.0.1:7101"
peer = "127.0.0.1:7102"
nbd = "127.0.0.1:10809"

[[cluster]]
id = 3
name = "n3"
kind = "witness"
control = "127.0.0.1:7301"
peer = "127.0.0.1:7302"

[volume.vol0]
data = "/dev/vg/vol0"
"#;

    fn parse_text(text: &str) -> Result<NodeConfig, ConfigError> {
        parse(Path::new("/srv/n1/node.toml"), text)
    }

    fn error(text: &str) -> String {
        parse_text(text).unwrap_err().to_string()
    }

    #[test]
    fn a_good_file_gives_defaults_and_absolute_paths() {
        let config = parse_text(GOOD).unwrap();
        assert_eq!(config.dir, Path::new("/srv/n1"));
        assert_eq!(config.admin, Path::new("/srv/n1/admin.sock"));
        assert_eq!(config.nbd_unix, Path::new("/srv/n1/nbd.sock"));
        assert_eq!(config.timing.lease, Duration::from_millis(1500));
        assert_eq!(config.founders.len(), 2);
        assert_eq!(config.volumes["vol0"].data.as_deref(), Some(Path::new("/dev/vg/vol0")));
        assert_eq!(config.volumes["vol0"].meta, None);
    }

    #[test]
    fn limits_on_clients_have_defaults_and_an_idle_connection_stays() {
        let nbd = parse_text(GOOD).unwrap().nbd;
        assert_eq!((nbd.connections, nbd.idle_timeout), (ConnectionLimits::default(), None));
        assert_eq!(nbd.handshake_timeout, Duration::from_secs(10));
        let few =
            parse_text(&format!("{GOOD}\n[nbd]\nconnections_max = 7\nidle_timeout_s = 0\n")).unwrap().nbd;
        assert_eq!(few.connections, ConnectionLimits { all: 7, per_client: 7 });
        assert_eq!(few.idle_timeout, None);
        let idle = parse_text(&format!("{GOOD}\n[nbd]\nidle_timeout_s = 60\n")).unwrap().nbd.idle_timeout;
        assert_eq!(idle, Some(Duration::from_secs(60)));
    }

    #[test]
    fn unknown_keys_are_refused_with_file_line_and_what_is_allowed() {
        let text =
            error(&GOOD.replace("name = \"n1\"\nkind = \"data\"\n\n", "nmae = \"n1\"\nkind = \"data\"\n\n"));
        assert!(text.contains("/srv/n1/node.toml"), "{text}");
        assert!(text.contains("line 4"), "{text}");
        assert!(text.contains("nmae") && text.contains("expected one of"), "{text}");
    }

    #[test]
    fn wrong_kind_names_the_allowed_ones() {
        let text = error(&GOOD.replace("\"witness\"", "\"arbiter\""));
        assert!(text.contains("arbiter") && text.contains("witness"), "{text}");
    }

    #[test]
    fn values_that_break_a_rule_name_line_and_key() {
        let cases = [
            (
                GOOD.replace(
                    "control = \"127.0.0.1:7101\"\npeer = \"127.0.0.1:7102\"\nnbd_tcp",
                    "control = \"localhost\"\npeer = \"127.0.0.1:7102\"\nnbd_tcp",
                ),
                "line 8, key listen.control",
            ),
            (GOOD.replacen("id = 1", "id = 7", 1), "line 3, key node.id"),
            (GOOD.replace("id = 3", "id = 1"), "key cluster.id"),
            (GOOD.replacen("id = 1", "id = 0", 1), "ids start at 1"),
            (GOOD.replacen("kind = \"data\"", "kind = \"witness\"", 1), "key node.kind"),
            (GOOD.replacen("name = \"n1\"", "name = \"a b\"", 1), "key node.name"),
            (
                format!("{GOOD}\n[timing]\nlease_ms = 500\n"),
                "key timing.renew_ms: must be at most half of lease_ms",
            ),
            (format!("{GOOD}\n[timing]\nlease_ms = 1\n"), "not in 10 to 600000"),
            (
                format!("{GOOD}\n[timing]\nlease_ms = 80000\n"),
                "key timing.lease_ms: must be between 100 and 60000",
            ),
            (
                format!("{GOOD}\n[nbd]\nconnections_max = 0\n"),
                "key nbd.connections_max: 0 is not in 1 to 65536",
            ),
            (
                format!("{GOOD}\n[nbd]\nconnections_max = 8\nconnections_per_client_max = 9\n"),
                "key nbd.connections_per_client_max: 9 is not in 1 to 8",
            ),
            (
                format!("{GOOD}\n[nbd]\nhandshake_timeout_s = 601\n"),
                "key nbd.handshake_timeout_s: 601 is not in 1 to 600",
            ),
            (
                format!("{GOOD}\n[nbd]\nidle_timeout_s = 9\n"),
                "key nbd.idle_timeout_s: 9 is not 0 (never) or in 10 to 604800 seconds",
            ),
        ];
        for (text, expected) in cases {
            let error = error(&text);
            assert!(error.contains(expected), "expected '{expected}' in: {error}");
        }
    }

    #[test]
    fn a_socket_path_that_linux_would_cut_is_refused() {
        let long = format!("/srv/{}/node.toml", "d".repeat(120));
        let text = parse(Path::new(&long), GOOD).unwrap_err().to_string();
        assert!(text.contains("choose a shorter directory"), "{text}");
    }

    #[test]
    fn names_are_safe_for_paths() {
        for bad in ["", ".", "../x", "a/b", "-x", "a b"] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
        assert!(check_name("vol0.db-1_x").is_ok());
    }
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod property_tests;
