//! `cluster.json`: what `dev` tells tools about its nodes. A stable interface (design 9).
//!
//! Always replaced whole (temporary file, rename), so that a reader never sees half of it, and only
//! when it changed.

use std::path::{Path, PathBuf};

use blkrepl_engine::durable;
use serde::{Deserialize, Serialize};

/// Name of the file in the `dev` directory.
pub const FILE_NAME: &str = "cluster.json";

/// The file's content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterJson {
    /// Name of the volume.
    pub volume: String,
    /// Its size in bytes.
    pub size: u64,
    /// The nodes by id.
    pub nodes: Vec<NodeJson>,
}

/// One node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeJson {
    /// Id.
    pub id: u64,
    /// Name.
    pub name: String,
    /// `data` or `witness`.
    pub kind: String,
    /// Process id; `null` while the node does not run.
    pub pid: Option<u32>,
    /// URI of the volume over the unix socket; `null` on a witness.
    pub nbd_unix: Option<String>,
    /// URI of the volume over TCP; `null` on a witness.
    pub nbd_tcp: Option<String>,
    /// Admin socket.
    pub admin: PathBuf,
    /// Config file.
    pub config: PathBuf,
    /// Data file; `null` on a witness.
    pub data: Option<PathBuf>,
    /// Metadata file; `null` on a witness.
    pub meta: Option<PathBuf>,
}

/// Reads the file of `dir`; `None` if there is none or it is not ours.
pub fn read(dir: &Path) -> Option<ClusterJson> {
    serde_json::from_slice(&std::fs::read(dir.join(FILE_NAME)).ok()?).ok()
}

/// Replaces the file of `dir`.
///
/// # Errors
/// The file system's.
pub fn write(dir: &Path, content: &ClusterJson) -> std::io::Result<()> {
    let mut text = serde_json::to_vec_pretty(content)?;
    text.push(b'\n');
    durable::replace(&dir.join(FILE_NAME), &text)
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::option;
    use proptest::prelude::*;

    use super::*;

    fn sample() -> ClusterJson {
        ClusterJson {
            volume: "vol0".into(),
            size: 1 << 30,
            nodes: vec![NodeJson {
                id: 1,
                name: "n1".into(),
                kind: "data".into(),
                pid: Some(4242),
                nbd_unix: Some("nbd+unix:///vol0?socket=/d/n1/nbd.sock".into()),
                nbd_tcp: Some("nbd://127.0.0.1:20000/vol0".into()),
                admin: "/d/n1/admin.sock".into(),
                config: "/d/n1/node.toml".into(),
                data: Some("/d/n1/vol0.data".into()),
                meta: Some("/d/n1/vol0.meta".into()),
            }],
        }
    }

    #[test]
    fn the_file_reads_back_and_has_the_documented_keys() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(read(dir.path()), None);
        write(dir.path(), &sample()).unwrap();
        write(dir.path(), &sample()).unwrap();
        assert_eq!(read(dir.path()), Some(sample()));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file is left");
        let json: serde_json::Value =
            serde_json::from_slice(&std::fs::read(dir.path().join(FILE_NAME)).unwrap()).unwrap();
        let keys: Vec<_> = json["nodes"][0].as_object().unwrap().keys().cloned().collect();
        let expected =
            ["admin", "config", "data", "id", "kind", "meta", "name", "nbd_tcp", "nbd_unix", "pid"];
        assert_eq!(keys, expected);
    }

    fn path() -> impl Strategy<Value = PathBuf> {
        any::<String>().prop_map(PathBuf::from)
    }

    prop_compose! {
        fn node()(
            id in any::<u64>(),
            (name, kind) in any::<(String, String)>(),
            (pid, nbd_unix, nbd_tcp) in any::<(Option<u32>, Option<String>, Option<String>)>(),
            (admin, config) in (path(), path()),
            (data, meta) in (option::of(path()), option::of(path())),
        ) -> NodeJson {
            NodeJson { id, name, kind, pid, nbd_unix, nbd_tcp, admin, config, data, meta }
        }
    }

    prop_compose! {
        fn content()(
            (volume, size) in any::<(String, u64)>(),
            nodes in vec(node(), 0..4),
        ) -> ClusterJson {
            ClusterJson { volume, size, nodes }
        }
    }

    proptest! {
        #[test]
        fn any_cluster_is_read_as_it_was_written(content in content()) {
            let dir = tempfile::tempdir().unwrap();
            write(dir.path(), &content).unwrap();
            prop_assert_eq!(read(dir.path()), Some(content));
        }

        #[test]
        fn a_file_that_was_cut_off_is_not_ours(content in content(), at in any::<prop::sample::Index>()) {
            let dir = tempfile::tempdir().unwrap();
            write(dir.path(), &content).unwrap();
            let file = dir.path().join(FILE_NAME);
            let whole = std::fs::read(&file).unwrap();
            // Without its last byte, a newline, it is still whole.
            std::fs::write(&file, &whole[..at.index(whole.len() - 1)]).unwrap();
            prop_assert_eq!(read(dir.path()), None);
        }

        #[test]
        fn other_bytes_are_not_ours(bytes in vec(any::<u8>(), 0..200)) {
            let dir = tempfile::tempdir().unwrap();
            std::fs::write(dir.path().join(FILE_NAME), &bytes).unwrap();
            prop_assert_eq!(read(dir.path()), None);
        }
    }
}
