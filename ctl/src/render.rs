//! Human output: compact tables of what `--json` prints in full.
//!
//! Text for people, free to change. Pure: values in, text out.

use crate::admin::{Done, NodeView, ReplicaView, SettingsView, SharingWord, StatusView, VolumeView};
use crate::events::{EventRecord, format_wall};

/// Bytes with a binary unit and at most one digit after the point.
pub fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if n < 1024 {
        return format!("{n} B");
    }
    let mut unit = 0;
    let mut scaled = n as f64 / 1024.0;
    // What would be rounded to 1024 is one of the next unit.
    while scaled >= 1023.95 && unit + 1 < UNITS.len() {
        scaled /= 1024.0;
        unit += 1;
    }
    let text = format!("{scaled:.1}");
    format!("{} {}", text.strip_suffix(".0").unwrap_or(&text), UNITS[unit])
}

/// Columns padded to their widest cell, two spaces between.
pub fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = head.iter().map(|h| h.len()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let mut text = String::new();
        for (cell, width) in cells.zip(&widths) {
            text.push_str(&format!("{cell:<width$}  "));
        }
        format!("{}\n", text.trim_end())
    };
    let mut out = line(&mut head.iter().copied());
    for row in rows {
        out.push_str(&line(&mut row.iter().map(String::as_str)));
    }
    out
}

/// `blkrepl status`.
pub fn status(view: &StatusView) -> String {
    let mut out = nodes(&view.nodes);
    if view.cluster.is_none() {
        out.push_str(
            "\nThe cluster is not formed yet: every founder of node.toml must run and reach the others.\n",
        );
    }
    for volume in &view.volumes {
        out.push('\n');
        out.push_str(&self::volume(volume));
    }
    if view.volumes.is_empty() && view.cluster.is_some() {
        out.push_str("\nNo volumes. Make one with: blkrepl volume create NAME --size SIZE\n");
    }
    out
}

/// `blkrepl node list`.
pub fn nodes(nodes: &[NodeView]) -> String {
    let rows: Vec<Vec<String>> = nodes
        .iter()
        .map(|n| {
            vec![
                n.name.clone(),
                n.id.to_string(),
                n.kind.clone(),
                if n.reachable { "up" } else { "down" }.to_string(),
                if n.leader { "leader" } else { "-" }.to_string(),
                n.control.clone(),
                if n.nbd.is_empty() { "-".to_string() } else { n.nbd.clone() },
            ]
        })
        .collect();
    table(&["NODE", "ID", "KIND", "STATE", "RAFT", "CONTROL", "NBD"], &rows)
}

/// `blkrepl volume list`.
pub fn volumes(volumes: &[VolumeView]) -> String {
    let rows: Vec<Vec<String>> = volumes
        .iter()
        .map(|v| {
            vec![
                v.name.clone(),
                bytes(v.size),
                v.primary.clone().unwrap_or_else(|| "-".to_string()),
                service(v).to_string(),
                format!("{}/{}", v.in_sync.len(), v.replicas.len()),
                v.epoch.to_string(),
            ]
        })
        .collect();
    table(&["VOLUME", "SIZE", "PRIMARY", "SERVICE", "IN-SYNC", "EPOCH"], &rows)
}

/// `blkrepl volume show`.
pub fn volume(v: &VolumeView) -> String {
    let mut out = format!(
        "volume {}  {}  {}  primary {}  epoch {}  reign {}{}\n",
        v.name,
        bytes(v.size),
        service(v),
        v.primary.as_deref().unwrap_or("-"),
        v.epoch,
        v.reign,
        if v.degraded { "  degraded" } else { "" },
    );
    let rows: Vec<Vec<String>> = v.replicas.iter().map(replica_row).collect();
    out.push_str(&table(&["  NODE", "ROLE", "STATE", "LACKS", "RESYNC"], &rows));
    for replica in &v.replicas {
        if let Some(failure) = &replica.failure {
            out.push_str(&format!("  {}: {failure}\n", replica.node));
        }
    }
    if let Some(note) = &v.note {
        out.push_str(&format!("  {note}\n"));
    }
    match (&v.attached, v.sharing) {
        (Some(client), _) => out.push_str(&format!("  attached by {client}\n")),
        (None, SharingWord::Exclusive) => out.push_str("  attached by nobody\n"),
        (None, SharingWord::Shared) => out.push_str("  shared by any number of client hosts\n"),
    }
    if let Some(set) = &v.settings {
        out.push_str(&format!("  settings: {}\n", settings(set)));
    }
    out
}

/// Settings in one line.
pub fn settings(s: &SettingsView) -> String {
    format!(
        "resync-latency {} ms, resync-window {}, intent-regions {}, peer-timeout {} ms, disk-timeout {} ms",
        s.resync_latency_ms,
        bytes(s.resync_window_bytes.into()),
        s.intent_regions_max,
        s.peer_timeout_ms,
        s.disk_timeout_ms
    )
}

fn service(v: &VolumeView) -> &'static str {
    match (v.serving, v.demoted) {
        (true, _) => "serving",
        (false, true) => "demoted",
        (false, false) => "no service",
    }
}

fn replica_row(r: &ReplicaView) -> Vec<String> {
    let resync = r.resync.map_or_else(
        || "-".to_string(),
        |p| {
            let eta = p.eta_s.map_or_else(String::new, |s| format!(", {s} s left"));
            format!("{} of {} at {}/s{eta}", bytes(p.done_bytes), bytes(p.total_bytes), bytes(p.bytes_per_s))
        },
    );
    vec![
        format!("  {}", r.node),
        r.role.clone(),
        r.state.replace('_', "-"),
        r.dirty_bytes.map_or_else(|| "?".to_string(), bytes),
        resync,
    ]
}

/// One line of `blkrepl events`.
pub fn event(e: &EventRecord) -> String {
    format!("{}  {}  {}  {}", format_wall(e.time_ms), e.node, e.volume.as_deref().unwrap_or("-"), e.text)
}

/// What a command that changed something says.
pub fn done(d: &Done) -> String {
    format!("{}\n", d.text)
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use blkrepl_engine::types::VolumeSettings;

    use super::*;
    use crate::admin::{DurabilityWord, ResyncView};

    pub(crate) fn sample() -> VolumeView {
        VolumeView {
            name: "vol0".into(),
            id: "0".repeat(32),
            size: 1 << 30,
            block_size: 4096,
            durability: DurabilityWord::Flush,
            settings: Some(VolumeSettings::default().into()),
            sharing: SharingWord::Exclusive,
            attached: Some("n1".into()),
            epoch: 5,
            reign: 4,
            lineage: "1".repeat(32),
            primary: Some("n2".into()),
            demoted: false,
            serving: true,
            degraded: true,
            in_sync: vec!["n2".into()],
            note: None,
            replicas: vec![
                ReplicaView {
                    node: "n1".into(),
                    role: "secondary".into(),
                    state: "resyncing".into(),
                    dirty_bytes: Some(3 << 20),
                    resync: Some(ResyncView {
                        done_bytes: 1 << 20,
                        total_bytes: 4 << 20,
                        moved_bytes: 1 << 20,
                        bytes_per_s: 1 << 20,
                        eta_s: Some(3),
                    }),
                    epoch: Some(5),
                    writes_acked: Some(0),
                    intent_regions: Some(0),
                    failure: None,
                },
                ReplicaView {
                    node: "n2".into(),
                    role: "primary".into(),
                    state: "in_sync".into(),
                    dirty_bytes: Some(0),
                    resync: None,
                    epoch: Some(5),
                    writes_acked: Some(7),
                    intent_regions: Some(1),
                    failure: None,
                },
            ],
        }
    }

    #[test]
    fn sizes_read_well() {
        let cases = [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (1 << 30, "1 GiB"),
            ((1 << 20) - 1, "1 MiB"),
        ];
        for (n, text) in cases {
            assert_eq!(bytes(n), text);
        }
    }

    #[test]
    fn a_volume_in_resync_shows_what_is_left() {
        let expected = "\
volume vol0  1 GiB  serving  primary n2  epoch 5  reign 4  degraded
  NODE  ROLE       STATE      LACKS  RESYNC
  n1    secondary  resyncing  3 MiB  1 MiB of 4 MiB at 1 MiB/s, 3 s left
  n2    primary    in-sync    0 B    -
  attached by n1
  settings: resync-latency 10 ms, resync-window 4 MiB, intent-regions 256, peer-timeout 1000 ms, disk-timeout 30000 ms
";
        assert_eq!(volume(&sample()), expected);
    }

    #[test]
    fn lists_are_aligned() {
        assert_eq!(
            volumes(&[sample()]),
            "VOLUME  SIZE   PRIMARY  SERVICE  IN-SYNC  EPOCH\nvol0    1 GiB  n2       serving  1/2      5\n"
        );
    }

    #[test]
    fn the_json_of_a_volume_has_the_documented_keys() {
        let json = serde_json::to_value(sample()).unwrap();
        for key in ["name", "size", "epoch", "primary", "in_sync", "replicas"] {
            assert!(json.get(key).is_some(), "{key}");
        }
        let replica = &json["replicas"][0];
        for key in ["node", "role", "state", "dirty_bytes", "resync"] {
            assert!(replica.get(key).is_some(), "{key}");
        }
        for key in ["done_bytes", "total_bytes", "bytes_per_s", "eta_s"] {
            assert!(replica["resync"].get(key).is_some(), "{key}");
        }
    }

    proptest! {
        #[test]
        fn any_size_is_shown_to_a_tenth_of_a_unit_that_fits(any in any::<u64>(), bits in 0u32..64) {
            let n = any >> bits;
            let text = bytes(n);
            let (number, unit) = text.split_once(' ').unwrap();
            let power = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"].iter().position(|u| *u == unit).unwrap();
            let shown: f64 = number.parse().unwrap();
            prop_assert!(shown < 1024.0 || unit == "PiB", "{}", text);
            let exact = n as f64 / 1024f64.powi(i32::try_from(power).unwrap());
            prop_assert!((shown - exact).abs() < 0.0501, "{} is shown as {}", n, text);
        }
    }
}
