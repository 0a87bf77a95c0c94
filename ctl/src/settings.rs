//! A volume's settings between the forms that operators see (milliseconds, only what changes) and the one of the
//! cluster state. Whether a value is possible is decided by the control plane.

use std::time::Duration;

use blkrepl_engine::types::VolumeSettings;

use crate::admin::{SettingsChange, SettingsView};

impl SettingsChange {
    /// The settings with this change.
    #[must_use]
    pub fn of(&self, now: VolumeSettings) -> VolumeSettings {
        let time = |ms: Option<u64>, old| ms.map_or(old, Duration::from_millis);
        VolumeSettings {
            peer_timeout: time(self.peer_timeout_ms, now.peer_timeout),
            disk_timeout: time(self.disk_timeout_ms, now.disk_timeout),
            intent_regions_max: self.intent_regions_max.unwrap_or(now.intent_regions_max),
            resync_window_bytes: self.resync_window_bytes.unwrap_or(now.resync_window_bytes),
            resync_latency_budget: time(self.resync_latency_ms, now.resync_latency_budget),
            durability: now.durability,
        }
    }
}

impl From<VolumeSettings> for SettingsView {
    fn from(s: VolumeSettings) -> Self {
        let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        Self {
            peer_timeout_ms: millis(s.peer_timeout),
            disk_timeout_ms: millis(s.disk_timeout),
            intent_regions_max: s.intent_regions_max,
            resync_window_bytes: s.resync_window_bytes,
            resync_latency_ms: millis(s.resync_latency_budget),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_leaves_alone_what_it_does_not_name() {
        let now = VolumeSettings::default();
        assert_eq!(SettingsChange::default().of(now), now);
        let change = SettingsChange { resync_latency_ms: Some(3), ..SettingsChange::default() };
        let want = VolumeSettings { resync_latency_budget: Duration::from_millis(3), ..now };
        assert_eq!(change.of(now), want);
        assert_eq!(SettingsView::from(want).resync_latency_ms, 3);
    }
}
