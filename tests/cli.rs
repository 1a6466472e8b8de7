//! Flags of the examples: what would be ignored is refused.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../examples/cli/mod.rs"]
mod cli;

use clap::Parser;
use clap::error::ErrorKind;
use foldgpt::plan::{Donor, Ranks, ResidualStart, ScaleStart};

#[derive(Debug, Parser)]
struct Args {
    #[command(flatten)]
    target: cli::target::TargetArgs,
    #[command(flatten)]
    sharing: cli::target::SharingArgs,
}

fn parse(flags: &str) -> Result<Args, clap::Error> {
    Args::try_parse_from(std::iter::once("compress").chain(flags.split_whitespace()))
}

#[test]
fn flags_of_sharing_need_what_they_are_about() {
    for flags in [
        "--remove 0.2",
        "--group-size 2 --donor best --no-norms --scales --rank 8 --start svd",
        "--budget-params 0.6 --remove 0.1 --donor first",
        "--budget-params 0.6 --search",
        "--budget-params 0.6 --groups budget --donor best --scales --rank 8 --start svd",
    ] {
        assert!(parse(flags).is_ok(), "{flags}: {:?}", parse(flags));
    }
    for (flags, kind) in [
        ("--remove 0.2 --donor first", ErrorKind::MissingRequiredArgument),
        ("--remove 0.2 --no-norms", ErrorKind::MissingRequiredArgument),
        ("--budget-params 0.6 --no-norms", ErrorKind::MissingRequiredArgument),
        ("--remove 0.2 --scales", ErrorKind::MissingRequiredArgument),
        ("--remove 0.2 --rank 8", ErrorKind::MissingRequiredArgument),
        ("--remove 0.2 --start svd", ErrorKind::MissingRequiredArgument),
        ("--group-size 2 --start svd", ErrorKind::MissingRequiredArgument),
        ("--budget-params 0.6 --scales", ErrorKind::MissingRequiredArgument),
        ("--budget-params 0.6 --rank 8", ErrorKind::MissingRequiredArgument),
        ("--groups budget", ErrorKind::MissingRequiredArgument),
        ("--group-size 2 --budget-params 0.6", ErrorKind::ArgumentConflict),
        ("--group-size 2 --groups budget", ErrorKind::ArgumentConflict),
        ("--group-size 2 --search", ErrorKind::ArgumentConflict),
        ("--budget-params 0.6 --groups budget --search", ErrorKind::ArgumentConflict),
        ("--remove 0.2 --search", ErrorKind::MissingRequiredArgument),
    ] {
        assert_eq!(parse(flags).unwrap_err().kind(), kind, "{flags}");
    }
}

#[test]
fn flags_of_sharing_say_what_is_shared() {
    let of = |flags: &str| parse(flags).unwrap().sharing.share(|| Ok(1000)).unwrap().unwrap();
    let share = of("--group-size 2 --donor best --scales --rank 8 --start svd");
    assert_eq!((share.donor, share.own.scales), (Donor::Best, Some(ScaleStart::LeastSquares)));
    assert!(share.own.norms && !of("--group-size 2 --no-norms").own.norms);
    let residual = share.own.residual.unwrap();
    assert_eq!((residual.ranks, residual.start), (Ranks::Uniform(8), ResidualStart::Svd));
    assert!(parse("--remove 0.2").unwrap().sharing.share(|| Ok(1000)).unwrap().is_none());
    assert_eq!(
        parse("--budget-params 0.6 --donor first").unwrap().sharing.mix().unwrap().donor,
        Donor::First
    );
}
