//! A mapped volume and what lies on it, inside a guest machine: `blkrepl map` as a process, the file system on its
//! device, the kernel's word on it. Used by the program `vm_rounds`, which runs there; `tests/tests/vm_map.rs` boots
//! the machine.
//!
//! Never does: deciding what fails; that is [`rounds`]'s.

mod device;
pub mod dist;
mod load;
pub mod power;
pub mod rounds;

pub use device::{Mapped, MappedFs};
pub use load::Load;
