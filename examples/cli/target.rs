//! Flags of what is removed and shared, and how the result is written.

use anyhow::Result;
use clap::{ArgGroup, Args, ValueEnum};
use foldgpt::pipeline::{Goal, MixOptions, Share, Total};
use foldgpt::plan::{Budget, Donor, Groups, Ranks, Residual, ResidualStart, ScaleStart};
use foldgpt::{Checkpoint, Format, Target};

// How much goes.
#[derive(Debug, Args)]
#[group(multiple = false)]
pub struct TargetArgs {
    /// Remove this share of the blocks, rounded to the nearest number
    #[arg(long)]
    pub remove: Option<f64>,
    /// Remove this many blocks
    #[arg(long)]
    pub remove_blocks: Option<usize>,
    /// Remove as few blocks as leave at most this many parameters
    #[arg(long)]
    pub max_params: Option<usize>,
}

impl TargetArgs {
    pub fn target(&self) -> Option<Target> {
        let rate = self.remove.map(Target::Rate);
        rate.or(self.remove_blocks.map(Target::Blocks)).or(self.max_params.map(Target::Parameters))
    }

    /// The same as a recipe has it.
    pub fn goal(&self) -> Option<Goal> {
        let rate = self.remove.map(Goal::Rate);
        rate.or(self.remove_blocks.map(Goal::Blocks)).or(self.max_params.map(Goal::Parameters))
    }
}

// What is shared by the blocks that stay, and what they keep. Of --budget-params alone the mix decides what they keep.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("tied").args(["group_size", "groups"]))]
#[command(group = ArgGroup::new("shared").args(["group_size", "budget_params"]))]
pub struct SharingArgs {
    /// Tie this many consecutive blocks: they use the same matrices
    #[arg(long)]
    pub group_size: Option<usize>,
    /// Tie the neighbours that cost the least, until the total of --budget-params is met
    #[arg(long, value_enum, requires = "budget_params")]
    pub groups: Option<GroupsArg>,
    /// Whose matrices tied blocks use
    #[arg(long, value_enum, default_value_t = DonorArg::Mean, requires = "shared")]
    pub donor: DonorArg,
    /// Tie the norms of tied blocks too, which are otherwise each block's own
    #[arg(long, requires = "tied")]
    pub no_norms: bool,
    /// Give tied blocks a factor for each output, fitted by least squares
    #[arg(long, requires = "tied")]
    pub scales: bool,
    /// Give tied blocks residuals of this rank
    #[arg(long, requires = "tied")]
    pub rank: Option<usize>,
    /// How residuals start
    #[arg(long, value_enum, default_value_t = StartArg::Whitened, requires = "rank")]
    pub start: StartArg,
    /// Meet this share of the parameters: by removal first (of at most as many blocks as --remove says, else a tenth),
    /// then by tying the cheapest neighbours, what is left over becoming rank
    #[arg(long)]
    pub budget_params: Option<f64>,
    /// With --budget-params, try removing none, half and all of the blocks that may go, each with 0, 5 and 15 % of the
    /// total kept for rank, and take the mix of the lowest loss
    #[arg(long, requires = "budget_params", conflicts_with = "tied")]
    pub search: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum GroupsArg {
    Budget,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DonorArg {
    First,
    Mean,
    /// The mean or the block that costs the least loss
    Best,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum StartArg {
    /// Truncated SVD of what the shared matrix lacks
    Svd,
    /// The same, whitened by the inputs' second moment
    Whitened,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum FormatArg {
    /// Each shared tensor once
    Compact,
    /// A standard directory, every block written out
    Expanded,
}

// How a model is written that was made of another one.
#[derive(Debug, Clone, Copy, Args)]
pub struct FormatArgs {
    /// How a model whose blocks share is written; as --model is where not given
    #[arg(long, value_enum)]
    pub format: Option<FormatArg>,
}

impl FormatArgs {
    /// The format that was asked for, or that of the source, where `adapted` says whether there will be adapters that it
    /// does not have. A model whose blocks share nothing, add nothing and lack nothing is a standard one.
    pub fn of(self, source: &Checkpoint, adapted: bool) -> Format {
        let plain = source.architecture().fold.is_plain() && !adapted;
        let same = if plain { Format::Expanded } else { Format::Compact };
        self.format.map_or(same, Format::from)
    }
}

impl From<FormatArg> for Format {
    fn from(format: FormatArg) -> Self {
        match format {
            FormatArg::Compact => Self::Compact,
            FormatArg::Expanded => Self::Expanded,
        }
    }
}

impl DonorArg {
    pub fn donor(self) -> Donor {
        match self {
            Self::First => Donor::First,
            Self::Mean => Donor::Mean,
            Self::Best => Donor::Best,
        }
    }
}

impl SharingArgs {
    /// Whether anything is shared by these flags.
    pub fn any(&self) -> bool {
        self.group_size.is_some() || self.budget_params.is_some()
    }

    /// What is shared by --group-size or --groups, of a model of so many parameters.
    pub fn share(&self, parameters: impl FnOnce() -> Result<usize>) -> Result<Option<Share>> {
        let groups = match (self.group_size, self.groups, self.budget_params) {
            (Some(size), _, _) => Groups::of(size),
            (None, Some(GroupsArg::Budget), Some(share)) => {
                anyhow::ensure!(
                    share > 0.0 && share < 1.0,
                    "--budget-params is {share}, expected above 0 and below 1"
                );
                Groups::until(Budget::Parameters((share * parameters()? as f64) as usize))
            }
            _ => return Ok(None),
        };
        let mut share = Share::new(groups);
        share.donor = self.donor.donor();
        share.own.norms = !self.no_norms;
        share.own.scales = self.scales.then_some(ScaleStart::LeastSquares);
        share.own.residual = self.rank.map(|rank| {
            let start = match self.start {
                StartArg::Svd => ResidualStart::Svd,
                StartArg::Whitened => ResidualStart::Whitened,
            };
            Residual { ranks: Ranks::Uniform(rank), start }
        });
        Ok(Some(share))
    }

    /// The total of --budget-params, where removal, sharing and rank meet it together.
    pub fn mix(&self) -> Option<MixOptions> {
        let share = self.budget_params.filter(|_| self.groups.is_none())?;
        let mut mix = MixOptions::new(Total::Share(share));
        (mix.donor, mix.search) = (self.donor.donor(), self.search);
        Some(mix)
    }
}
