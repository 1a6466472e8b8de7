//! Healing: a small fine-tune that gives a cut and folded model back most of what it lost, on one ordinary machine.
//!
//! [`Heal`] says what is trained ([`Trainable`]), on which losses ([`Losses`]), how fast and how long; the original
//! model may teach, from memory or from a file ([`Teacher`]). The way back goes block by block, so that memory beyond
//! the weights is the optimiser's state of what is trained, one input a block, and one block's activations.
//!
//! How fast depends on what is trained, since `AdamW` moves every number by about the learning rate a step, whatever its
//! gradient. These are the highest learning rates of [`ParamGroup::from`], which [`Heal::default`] takes too:
//!
//! | trained | learning rate | why |
//! |---|---:|---|
//! | norms, scales | 5e-3 | numbers of about 1, which have to move by tenths; IA³ (arXiv 2205.05638) takes 3e-3 |
//! | LoRA | 1e-3 | starts from nothing |
//! | residuals | 3e-4 | start from the best residual of their rank |
//! | matrices, last blocks, head, everything | 1e-4 | start from what was learnt, and move in every direction at once |
//!
//! ```
//! use foldgpt::candle::{DType, Device};
//! use foldgpt::heal::{Budget, Heal, Losses, Teacher, hold_out};
//! use foldgpt::{Bos, Checkpoint, Windows};
//!
//! let checkpoint = Checkpoint::open("examples/tiny-stories")?;
//! let dense = checkpoint.decoder(DType::F32, &Device::Cpu)?;
//! let cut = dense.with_blocks(&[0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11])?;
//! let text = "Anna lost her red kite near the old bridge. ".repeat(60);
//! let windows = Windows::from_text(&checkpoint.tokenizer()?, &text, 64, Some(4), Bos::Auto)?;
//! let (train, choosing) = hold_out(&windows)?;
//!
//! let mut heal = Heal::default();
//! (heal.budget, heal.batch, heal.losses) = (Budget::Steps(3), 2, Losses::tail());
//! let healed = heal.run(&cut, &train, Some(&choosing), Some(Teacher::Model(&dense)), &mut ())?;
//! assert_eq!(healed.report.steps, 3);
//! # Ok::<(), foldgpt::Error>(())
//! ```

mod adamw;
mod backward;
mod cache;
mod choosing;
#[cfg(test)]
mod gradient_tests;
mod identity;
mod log;
mod losses;
mod options;
mod order;
mod schedule;
mod state;
mod teacher;
mod trainable;
mod trainer;

pub use adamw::AdamW;
pub use cache::{CacheOptions, TeacherCache};
pub use choosing::hold_out;
pub use log::{Record, read_log};
pub use losses::{Losses, Terms};
pub use options::{Budget, Heal};
pub use schedule::{Decay, Schedule};
pub use teacher::Teacher;
pub use trainable::{Lora, ParamGroup, Trainable};
pub use trainer::{HealReport, Healed};
