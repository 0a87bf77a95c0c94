//! What is installed from `ctl/dist`, in a machine that has no sources: the files stand in its share, and
//! commands of the documents find them there.

use std::fs;

use anyhow::{Context, Result};

use crate::binary::{blkrepl, workspace};
use crate::vm::Vm;

const FILES: [&str; 3] = ["blkrepl.service", "blkrepl-map@.service", "60-blkrepl.rules"];

/// Puts the binary and the files where the machine finds them.
///
/// # Errors
/// Where one cannot be copied.
pub fn put(vm: &Vm) -> Result<()> {
    vm.put_program(blkrepl()?)?;
    for name in FILES {
        let (from, to) = (workspace().join("ctl/dist").join(name), vm.share().join(name));
        fs::copy(&from, &to).with_context(|| format!("copy {}", from.display()))?;
    }
    Ok(())
}

/// Commands of a document, which are given in the directory of the sources, as they are run in a machine.
#[must_use]
pub fn in_machine(commands: &str) -> String {
    commands.replace("target/release/", "/host/bin/").replace("ctl/dist/", "/host/")
}
