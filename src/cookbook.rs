//! Short answers to what applications ask first. Those with code are programs that run on the tiny model that comes
//! with the crate's repository; the one for GPUs is only compiled.
//!
//! - [In a service](#in-a-service): load once, cancel from another thread, send progress through a channel
//! - [Own calibration text](#own-calibration-text)
//! - [Own importance method](#own-importance-method)
//! - [Own architecture](#own-architecture): a `model_type` that the crate does not know
//! - [A compact checkpoint](#a-compact-checkpoint): write one, load it and generate
//! - [On CUDA or Metal](#on-cuda-or-metal)
//! - [What takes the time](#what-takes-the-time): stages by an observer, and as spans of `tracing`
//!
//! The whole job by one recipe is [`Compressor`](crate::Compressor)'s, and [`pipeline`](crate::pipeline) shows it.
//!
//! # In a service
//!
//! A [`Decoder`](crate::Decoder) is loaded once: its clones share the weights, and all of its calls take `&self`, so
//! that threads may use it at the same time. An [`Observer`](crate::Observer) is what ties a long call to the rest of
//! the process: it sends progress where it is shown, and asks a flag whether anybody still waits.
//!
//! ```
//! use foldgpt::candle::{DType, Device};
//! use foldgpt::heal::{Budget, Heal};
//! use foldgpt::{Bos, Checkpoint, Error, Observer, Windows};
//! use std::ops::ControlFlow;
//! use std::sync::atomic::{AtomicBool, Ordering};
//! use std::sync::{Arc, mpsc};
//!
//! struct Job { cancelled: Arc<AtomicBool>, progress: mpsc::Sender<(&'static str, u64, u64)> }
//!
//! impl Observer for Job {
//!     fn advanced(&mut self, stage: &'static str, done: u64, total: u64) -> ControlFlow<()> {
//!         let _ = self.progress.send((stage, done, total)); // nobody has to listen
//!         if self.cancelled.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
//!     }
//! }
//!
//! let checkpoint = Checkpoint::open("examples/tiny-stories")?;
//! let decoder = checkpoint.decoder(DType::F32, &Device::Cpu)?;
//! let text = "Anna lost her red kite near the old bridge. ".repeat(20);
//! let windows = Windows::from_text(&checkpoint.tokenizer()?, &text, 32, Some(4), Bos::Auto)?;
//!
//! let (cancelled, (progress, heard)) = (Arc::new(AtomicBool::new(false)), mpsc::channel());
//! let mut job = Job { cancelled: cancelled.clone(), progress };
//! let mut heal = Heal::default();
//! (heal.budget, heal.batch) = (Budget::Minutes(60.0), 1);
//! let worker = std::thread::spawn(move || heal.run(&decoder, &windows, None, None, &mut job));
//! assert_eq!(heard.recv().map(|(stage, ..)| stage), Ok("heal"));
//! cancelled.store(true, Ordering::Relaxed); // after its first step, another thread wants no more of it
//! assert!(matches!(worker.join(), Ok(Err(Error::Cancelled { stage: "heal" }))));
//! # Ok::<(), Error>(())
//! ```
//!
//! With a `state_file` the same healing goes on later where it was cancelled, and so does a
//! [`Compressor`](crate::Compressor) with its working directory.
//!
//! # Own calibration text
//!
//! Whatever becomes [`Windows`](crate::Windows): a text, the documents of JSON Lines, or token ids.
//! [`spread`](crate::Windows::spread) takes windows from all over it. Measure on a text that has not calibrated.
//!
//! ```
//! use foldgpt::candle::{DType, Device};
//! use foldgpt::importance::BlockInfluence;
//! use foldgpt::{Bos, Checkpoint, Importance, Windows, data};
//!
//! let line = "{\"id\": 7, \"body\": \"Tom found a blue ball near the river, and Anna was happy.\"}\n";
//! let text = data::json_lines(&line.repeat(40), "body")?;
//!
//! let checkpoint = Checkpoint::open("examples/tiny-stories")?;
//! let (tokenizer, decoder) = (checkpoint.tokenizer()?, checkpoint.decoder(DType::F32, &Device::Cpu)?);
//! let (first, held_out) = Windows::split_from_text(&tokenizer, &text, 48, Some(2), Bos::Auto)?;
//! let scores = BlockInfluence::default().score(&decoder, &first.spread(4)?, &mut ())?;
//! let before = foldgpt::perplexity(&decoder, &held_out, &mut ())?;
//! assert_eq!((scores.windows, before.windows), (4, 2));
//!
//! let ids = tokenizer.encode("Anna lost her red kite.")?;
//! let windows = Windows::from_ids(vec![ids.clone(), ids])?; // as long as each other, cut by whom you like
//! assert_eq!(windows.len(), 2);
//! # Ok::<(), foldgpt::Error>(())
//! ```
//!
//! # Own importance method
//!
//! [`Importance`](crate::Importance) is one function from a decoder and windows to [`Scores`](crate::Scores). Plans
//! take the scores of any method; the lowest go first. (A [`Recipe`](crate::Recipe) names the crate's own methods only.)
//!
//! ```
//! # use foldgpt::candle::{DType, Device};
//! # use foldgpt::{Bos, Checkpoint};
//! use foldgpt::candle::Tensor;
//! use foldgpt::{Decoder, Error, Importance, Observer, Plan, Result, Scores, Target, Windows};
//!
//! /// How long what a block adds is, beside what it is added to.
//! struct RelativeUpdate;
//!
//! impl Importance for RelativeUpdate {
//!     fn method(&self) -> &'static str { "relative-update" }
//!
//!     fn score(&self, decoder: &Decoder, windows: &Windows, observer: &mut dyn Observer) -> Result<Scores> {
//!         let length = |x: &Tensor| -> Result<f64> { Ok(x.sqr()?.sum_all()?.sqrt()?.to_scalar::<f32>()?.into()) };
//!         let mut by_window = Vec::new();
//!         for index in 0..windows.len() {
//!             let states = decoder.hidden_states(&windows.tensor(index, decoder.device())?)?; // before and after blocks
//!             let pairs = states.windows(2).map(|pair| Ok(length(&(&pair[1] - &pair[0])?)? / length(&pair[0])?));
//!             by_window.push(pairs.collect::<Result<Vec<f64>>>()?);
//!             if observer.advanced(self.method(), index as u64 + 1, windows.len() as u64).is_break() {
//!                 return Err(Error::Cancelled { stage: self.method() });
//!             }
//!         }
//!         Scores::of_windows(self.method(), windows, &by_window)
//!     }
//! }
//!
//! # let checkpoint = Checkpoint::open("examples/tiny-stories")?;
//! # let decoder = checkpoint.decoder(DType::F32, &Device::Cpu)?;
//! # let text = "Anna lost her red kite near the old bridge. ".repeat(20);
//! # let windows = Windows::from_text(&checkpoint.tokenizer()?, &text, 32, Some(4), Bos::Auto)?;
//! let scores = RelativeUpdate.score(&decoder, &windows, &mut ())?;
//! let plan = Plan::new(decoder.architecture(), &scores, Target::Blocks(2), &[])?;
//! assert_eq!(plan.removed().len(), 2);
//! # Ok::<(), Error>(())
//! ```
//!
//! # Own architecture
//!
//! Families are told apart by `model_type` alone, and one that is not known is an error. Where a model computes what a
//! known family computes, under another name, give it a directory with a config that says so. Every tensor's name and
//! shape is then checked against that config; what differs in its arithmetic alone is not seen, so compare logits with
//! the original once.
//!
//! ```
//! use foldgpt::Checkpoint;
//! use serde_json::Value;
//! use std::{fs, path::Path};
//!
//! let theirs = Path::new("examples/tiny-stories");
//! let ours = std::env::temp_dir().join(format!("foldgpt-cookbook-{}", std::process::id()));
//! fs::create_dir_all(&ours)?;
//! let mut config: Value = serde_json::from_str(&fs::read_to_string(theirs.join("config.json"))?)?;
//! config["model_type"] = "storyteller".into(); // as a model may call itself
//! fs::write(ours.join("config.json"), config.to_string())?;
//! for file in ["model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
//!     fs::copy(theirs.join(file), ours.join(file))?; // a link will do
//! }
//! assert!(Checkpoint::open(&ours).is_err_and(|error| error.to_string().contains("`storyteller`")));
//!
//! config["model_type"] = "llama".into(); // what it computes
//! fs::write(ours.join("config.json"), config.to_string())?;
//! assert_eq!(Checkpoint::open(&ours)?.architecture().depth(), 12);
//! # fs::remove_dir_all(&ours)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Where tensors have other names or lie in other files, [`Architecture::from_config`](crate::Architecture::from_config)
//! reads the config, [`Decoder::build`](crate::Decoder::build) asks for one parameter after the other by a name that no
//! family has, and [`Checkpoint::create`](crate::Checkpoint::create) with
//! [`save`](crate::Checkpoint::save) writes the directory that everything else opens.
//!
//! # A compact checkpoint
//!
//! It keeps what blocks share once, and opens like any other. The other format, [`Format::Expanded`](crate::Format), is
//! for other readers.
//!
//! ```
//! use foldgpt::candle::{DType, Device};
//! use foldgpt::plan::Groups;
//! use foldgpt::{Checkpoint, Format, Generate, Plan, fold};
//! use std::ops::ControlFlow;
//!
//! let checkpoint = Checkpoint::open("examples/tiny-stories")?;
//! let dense = checkpoint.decoder(DType::F32, &Device::Cpu)?;
//! let plan = Plan::builder().share(Groups::of_within(2, 4..=9)).build(dense.architecture())?;
//! let out = std::env::temp_dir().join(format!("foldgpt-compact-{}", std::process::id()));
//! checkpoint.save(&fold(&dense, &plan)?, Some(&plan), &out, &Format::Compact.into(), &mut ())?;
//!
//! let compact = Checkpoint::open(&out)?;
//! let decoder = compact.decoder(DType::F32, &Device::Cpu)?;
//! assert!(decoder.parameter_count() < dense.parameter_count());
//! let mut text = String::from("One day");
//! let options = Generate { max_tokens: 12, ..Generate::default() };
//! options.run(&decoder, &compact.tokenizer()?, "One day", |piece| {
//!     text.push_str(piece); // whole characters, as soon as they are known
//!     ControlFlow::Continue(())
//! })?;
//! assert!(text.len() > "One day".len());
//! # std::fs::remove_dir_all(&out).ok();
//! # Ok::<(), foldgpt::Error>(())
//! ```
//!
//! # On CUDA or Metal
//!
//! With `foldgpt = { version = "0.1", features = ["cuda"] }` (or `cudnn`, `metal`) the device is an argument of
//! [`Checkpoint::decoder`](crate::Checkpoint::decoder), and all calls go where the weights are. The fused kernels are
//! the CPU's; on other devices the same calls run on candle's primitives.
//!
//! ```no_run
//! use foldgpt::candle::{DType, Device};
//! use foldgpt::{Bos, Checkpoint, Windows};
//!
//! let device = Device::new_cuda(0)?; // or Device::new_metal(0)
//! let checkpoint = Checkpoint::open("org/name")?; // a hub id needs the feature `hub`
//! let decoder = checkpoint.decoder(DType::BF16, &device)?;
//! let text = std::fs::read_to_string("text.txt").unwrap_or_default();
//! let windows = Windows::from_text(&checkpoint.tokenizer()?, &text, 512, Some(32), Bos::Auto)?;
//! println!("{}", foldgpt::perplexity(&decoder, &windows, &mut ())?.perplexity);
//! # Ok::<(), foldgpt::Error>(())
//! ```
//!
//! A [`Compressor`](crate::Compressor) computes on the CPU.
//!
//! # What takes the time
//!
//! An [`Observer`](crate::Observer) hears of every stage when it begins and when it is over. Stages lie within one
//! another: the last one that began is the first to be over.
//!
//! ```
//! use foldgpt::candle::{DType, Device};
//! use foldgpt::{Bos, Checkpoint, Observer, Windows};
//! use std::time::{Duration, Instant};
//!
//! #[derive(Default)]
//! struct Times { running: Vec<Instant>, taken: Vec<(&'static str, Duration)> }
//!
//! impl Observer for Times {
//!     fn started(&mut self, _: &'static str, _: u64) {
//!         self.running.push(Instant::now());
//!     }
//!     fn finished(&mut self, stage: &'static str) {
//!         self.taken.extend(self.running.pop().map(|start| (stage, start.elapsed())));
//!     }
//! }
//!
//! let mut times = Times::default();
//! let checkpoint = Checkpoint::open("examples/tiny-stories")?;
//! let decoder = checkpoint.decoder_observed(DType::F32, &Device::Cpu, &mut times)?;
//! let text = "Anna lost her red kite near the old bridge. ".repeat(20);
//! let windows = Windows::from_text(&checkpoint.tokenizer()?, &text, 32, Some(2), Bos::Auto)?;
//! foldgpt::perplexity(&decoder, &windows, &mut times)?;
//! assert_eq!(times.taken.iter().map(|(stage, _)| *stage).collect::<Vec<_>>(), ["load", "perplexity"]);
//! # Ok::<(), foldgpt::Error>(())
//! ```
//!
//! Each of these stages is a span of `tracing` too, called `stage`, with its `name` and its `total` of steps, at the
//! level of info; those within it are inside. What is decided on the way is an event at the level of debug: what was
//! known from an earlier run, which blocks go, when a search ends. The library installs no subscriber; one of
//! `tracing-subscriber`'s with `with_span_events(FmtSpan::CLOSE)` prints the time of every stage when it is over.
