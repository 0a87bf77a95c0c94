//! Writes the seeds into `fuzz/corpus`: `cargo run --manifest-path fuzz/Cargo.toml --example seeds`. To be run
//! when a format has changed, or a seed was added. It deletes nothing: old inputs stay good to fuzz with.

use std::path::Path;

use blkrepl_fuzz::{TARGETS, seeds};

fn main() -> std::io::Result<()> {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    for (target, _) in TARGETS {
        let dir = corpus.join(target);
        std::fs::create_dir_all(&dir)?;
        for (name, bytes) in seeds::of(target) {
            std::fs::write(dir.join(name), bytes)?;
        }
    }
    Ok(())
}
