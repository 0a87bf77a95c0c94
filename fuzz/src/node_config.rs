//! `node.toml`, which an operator writes.

use std::path::Path;
use std::time::Duration;

use blkrepl_ctl::config::{UNIX_PATH_MAX, check_name, parse};

use crate::Verdict;

/// The text of a node's configuration. Holds: what is accepted obeys the rules that the rest of the program
/// relies on, and a refusal says something.
pub fn config(data: &[u8]) -> Verdict {
    let Ok(text) = std::str::from_utf8(data) else { return Verdict::Refused };
    let config = match parse(Path::new("/srv/n1/node.toml"), text) {
        Ok(config) => config,
        Err(error) => {
            assert!(error.to_string().contains("/srv/n1/node.toml"), "{error}");
            return Verdict::Refused;
        }
    };
    let me = config.founders.iter().find(|founder| founder.id == config.id).expect("it is a founder");
    assert_eq!((&me.name, me.kind), (&config.name, config.kind));
    assert!(config.founders.is_sorted_by(|a, b| a.id < b.id));
    assert!(config.founders.iter().all(|founder| check_name(&founder.name).is_ok() && founder.id.0 > 0));
    assert!(config.founders.iter().all(|founder| founder.control.port() != 0 && founder.peer.port() != 0));
    let timing = config.timing;
    assert!(timing.renew >= Duration::from_millis(10) && timing.renew * 2 <= timing.lease);
    assert!(timing.heartbeat * 2 <= timing.election.0 && timing.election.0 < timing.election.1);
    for socket in [&config.nbd_unix, &config.admin] {
        assert!(socket.is_absolute() && socket.as_os_str().len() <= UNIX_PATH_MAX);
    }
    for name in config.volumes.keys().map(String::as_str).chain(["vol0"]) {
        let (data, meta) = config.volume_paths(name);
        assert!(data.is_absolute() && meta.is_absolute());
    }
    Verdict::Accepted
}
