//! blkrepl beside DRBD, and beside an NBD server without replication, in one machine of [`crate::vm`]: the same disks,
//! the same loads, the same writer while something is done to them. What it says of them: docs/performance.md.
//!
//! ```text
//! mod          the order of things
//! systems      what is done to each system
//! loads        the loads of fio
//! connections  several connections of the kernel's client to one volume
//! figures      what was measured, and the table of it
//! writer       the program that writes in the machine while something fails
//! guest.sh     what is done there, step by step
//! ```
//!
//! The systems take turns, a whole turn each round, and only one of them runs at a time: the machine has one processor.

mod connections;
mod figures;
mod loads;
mod systems;
pub mod writer;

use std::fmt::Write;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::binary::blkrepl;
use crate::cluster::free_ports;
use crate::plan::NodePlan;
use crate::report::{human, step};
use crate::vm::{DiskKind, Kind, Vm, VmOptions, unavailable};
use figures::Figures;
use systems::SYSTEMS;

const NAME: &str = "vm_compare";
const GUEST: &str = include_str!("guest.sh");
/// Longest time of one step in the machine.
const STEP_LIMIT: Duration = Duration::from_secs(240);
/// Where nodes have their files in the machine.
const STATE: &str = "/data";
/// Room on DRBD's disks for its own data.
const DRBD_OWN_MIB: u64 = 4;
const META_MIB: u64 = 256;
/// Room on a volume behind what the writer and the largest resync take.
const SIZE_MIB_MIN: u64 = 32;

/// What is to be measured.
#[derive(Clone, Debug)]
pub struct Options {
    /// The kind of machine.
    pub kind: Kind,
    /// Length of each load.
    pub time: Duration,
    /// Turns of each system.
    pub rounds: u32,
    /// MiB of each volume.
    pub size_mib: u64,
    /// MiB that are changed while the secondary is away.
    pub changed_mib: Vec<u64>,
    /// Only systems with this in their names.
    pub only: Vec<String>,
    /// Only these of [`PARTS`]; all if none is named.
    pub parts: Vec<String>,
}

impl Options {
    /// Whether a part of the whole is to be measured.
    fn wants(&self, part: &str) -> bool {
        self.parts.is_empty() || self.parts.iter().any(|wanted| wanted == part)
    }
}

/// The parts of the whole.
pub const PARTS: [&str; 4] = ["loads", "connections", "faults", "resyncs"];

/// The machine, with the systems in it.
pub(crate) struct Guest {
    vm: Vm,
    options: Options,
}

impl Guest {
    fn new(options: &Options) -> Result<Self> {
        if let Some(reason) = unavailable(options.kind) {
            bail!("no machine here: {reason}");
        }
        if options.size_mib < SIZE_MIB_MIN.max(options.changed_mib.iter().copied().max().unwrap_or_default())
        {
            bail!("a volume of {} MiB is too small; see --size", options.size_mib);
        }
        let (size, with_own) = (options.size_mib << 20, (options.size_mib + DRBD_OWN_MIB) << 20);
        let mut vm_options = VmOptions::new(options.kind);
        for len in [size, size, size, with_own, with_own, META_MIB << 20] {
            vm_options = vm_options.disk(len, DiskKind::File);
        }
        let vm = Vm::new(vm_options)?;
        let mut guest = Self { vm, options: options.clone() };
        guest.put_files()?;
        step(NAME, &format!("{} booted in {}", options.kind.name(), human(guest.vm.boot()?)));
        Ok(guest)
    }

    /// Programs, the steps, and the nodes' configs.
    fn put_files(&self) -> Result<()> {
        self.vm.put_program(blkrepl()?)?;
        self.vm.put_program(&std::env::current_exe().context("find this program")?)?;
        let put = |name: &str, text: &str| {
            fs::write(self.vm.share().join(name), text).with_context(|| format!("write {name}"))
        };
        put("compare.sh", GUEST)?;
        let ports = free_ports(9)?;
        let plans: Vec<NodePlan> =
            (1..=3).zip(ports.chunks_exact(3)).map(|(id, p)| self.node(id, p)).collect();
        for plan in &plans {
            put(&format!("{}.toml", plan.name), &plan.config(&plans, "", "vol0"))?;
        }
        put("compare.env", &self.variables(&plans))
    }

    /// A data node, each with a disk of its own, or the witness.
    fn node(&self, id: u64, ports: &[u16]) -> NodePlan {
        let disk = match id {
            1 => Some(1),
            2 => Some(2),
            _ => None,
        };
        let dir = PathBuf::from(format!("{STATE}/n{id}"));
        let mut plan = NodePlan::new(id, disk.is_some(), dir, [ports[0], ports[1], ports[2]]);
        plan.data_path = disk.map(|index| self.vm.device(index).into());
        plan
    }

    fn variables(&self, plans: &[NodePlan]) -> String {
        let mut text = format!("SIZE_MIB={}\n", self.options.size_mib);
        for (name, index) in [("PLAIN", 0), ("DRBD_A", 3), ("DRBD_B", 4), ("META", 5)] {
            let _ = writeln!(text, "{name}={}", self.vm.device(index));
        }
        for plan in plans.iter().filter(|plan| plan.data) {
            let _ = writeln!(text, "PORT{}={}", plan.id, plan.nbd);
        }
        text
    }

    /// Runs steps of `guest.sh`; what they said on standard output.
    pub(crate) fn steps(&self, steps: &str) -> Result<String> {
        let done = self.vm.run(&format!(". /host/compare.sh\n{steps}"), STEP_LIMIT)?;
        Ok(done.ok().with_context(|| steps.to_owned())?.stdout)
    }
}

/// Boots the machine and measures all in it; the table.
///
/// # Errors
/// What went wrong, with the consoles and the logs of the nodes.
pub fn compare(options: &Options) -> Result<String> {
    let guest = Guest::new(options)?;
    let mut figures = Figures::default();
    if let Err(reason) = rounds(&guest, &mut figures) {
        let logs = guest
            .vm
            .run("tail -n 30 /data/*/log /data/map.log; cat /proc/drbd; dmesg | tail -n 40", STEP_LIMIT);
        let logs = logs.map(|done| done.text()).unwrap_or_default();
        return Err(reason.context(format!("{}\n{logs}\nso far:\n{}", guest.vm.consoles(), figures.table())));
    }
    Ok(figures.table())
}

fn rounds(guest: &Guest, figures: &mut Figures) -> Result<()> {
    let wanted = |name: &str| {
        guest.options.only.is_empty() || guest.options.only.iter().any(|part| name.contains(part.as_str()))
    };
    for round in 1..=guest.options.rounds {
        for system in SYSTEMS.iter().filter(|system| wanted(system.name)) {
            let begun = Instant::now();
            system
                .turn(guest, figures, round == 1)
                .with_context(|| format!("{}, round {round}", system.name))?;
            step(NAME, &format!("round {round}: {} in {}", system.name, human(begun.elapsed())));
        }
    }
    Ok(())
}
