//! Bytes of a dirty bitmap of 16 TiB on the wire, by the code of production: the bitmap's runs, framed.

use anyhow::Result;
use blkrepl_engine::meta::{Area, Layout, PagedBitmap};
use blkrepl_engine::types::{Geometry, Reign, ReplicaSlot, VolumeId};
use blkrepl_engine::wire::{PeerMsg, Run, RunsKind, encode};

use super::chart::{Axis, Chart};
use super::report::Report;
use super::{ScaleOptions, TIB};

const SIZE: u64 = 16 * TIB;
const BLOCK: u32 = 4096;
const REGION: u32 = 1 << 20;
/// Runs in a message, as the replica sends them.
const RUNS_PER_MSG: usize = 32_768;
/// Powers of two: pieces that are dirty, at equal distances.
const PIECES: std::ops::RangeInclusive<u32> = 0..=20;

pub(super) fn measure(options: &ScaleOptions, report: &mut Report) -> Result<()> {
    let geometry = Geometry::new(SIZE, BLOCK, REGION)?;
    let slot = ReplicaSlot(1);
    let x = Axis::doubling("dirty pieces, at equal distances");
    let mut chart = Chart::new("exchange-bytes", "Dirty bitmap of 16 TiB on the wire", x, Axis::log("KiB"));
    let raw = geometry.blocks().div_ceil(8) as f64 / 1024.0;
    for power in PIECES.step_by(if options.quick { 10 } else { 2 }) {
        let pieces = 1_u64 << power;
        let x = pieces as f64;
        let mut bitmap = PagedBitmap::new_clear(
            Area::Dirty(slot),
            geometry.blocks(),
            VolumeId(1),
            &Layout::new(&geometry),
        );
        for piece in 0..pieces {
            bitmap.set_range(piece * (geometry.blocks() / pieces), 16.min(geometry.blocks() / pieces));
        }
        chart.point("runs, as sent", x, framed(&bitmap, slot) as f64 / 1024.0);
        chart.point("plain bits", x, raw);
    }
    let mut full =
        PagedBitmap::new_full(Area::Dirty(slot), geometry.blocks(), VolumeId(1), &Layout::new(&geometry));
    report.number("a full bitmap of 16 TiB on the wire", framed(&full, slot) as f64, "bytes");
    full.clear_all();
    report.number("an empty bitmap of 16 TiB on the wire", framed(&full, slot) as f64, "bytes");
    report.chart(chart);
    Ok(())
}

/// Bytes of the frames that carry a bitmap.
fn framed(bitmap: &PagedBitmap, slot: ReplicaSlot) -> usize {
    let runs: Vec<Run> = bitmap.runs(0).collect();
    let mut bytes = Vec::new();
    let mut sum = 0;
    // An empty list goes in one message, too.
    let mut chunks: Vec<&[Run]> = runs.chunks(RUNS_PER_MSG).collect();
    if chunks.is_empty() {
        chunks.push(&[]);
    }
    for (at, chunk) in chunks.iter().enumerate() {
        bytes.clear();
        let last = at + 1 == chunks.len();
        let msg = PeerMsg::Runs { reign: Reign(1), kind: RunsKind::Dirty(slot), runs: chunk.to_vec(), last };
        encode(&msg, &mut bytes);
        sum += bytes.len();
    }
    sum
}
