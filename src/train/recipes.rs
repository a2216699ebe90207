//! Settings of published experiments, by name.

use super::{Options, TrainError};

/// The settings of a published experiment: a layer of [`Options`], any of which can be replaced. The place of the data
/// set is not among them.
#[derive(Debug, Clone, Copy)]
pub struct Recipe {
    /// Paper, data set, model and method, such as `cr-sam/cifar10/resnet18/sam`.
    pub name: &'static str,
    /// Where the values stand.
    pub source: &'static str,
    /// TOML that several recipes share, and that of this one.
    settings: [&'static str; 2],
}

const CR_SAM_TABLES: &str = "CR-SAM (Wu, Luo, Wunsch 2024), tables 4 and 5";
/// 200 epochs in batches of 128, SGD with a peak rate of 0.05.
const CR_SAM_RESNET18: &str = "model = \"resnet18\"\nepochs = 200\nbatch-size = 128\nlr = 0.05\nmomentum = 0.9\n\
    weight-decay = 0.005\nschedule = \"cosine\"\naugment = \"basic\"\n";

/// All recipes.
pub const RECIPES: &[Recipe] = &[
    Recipe {
        name: "cr-sam/cifar10/resnet18/sam",
        source: CR_SAM_TABLES,
        settings: [CR_SAM_RESNET18, "optimizer = \"sam\"\nrho = 0.05\n"],
    },
    Recipe {
        name: "cr-sam/cifar10/resnet18/cr-sam",
        source: CR_SAM_TABLES,
        settings: [CR_SAM_RESNET18, "optimizer = \"cr-sam\"\nrho = 0.1\nalpha = 0.1\nbeta = 0.01\n"],
    },
    Recipe {
        name: "cr-sam/cifar100/resnet18/sam",
        source: CR_SAM_TABLES,
        settings: [CR_SAM_RESNET18, "optimizer = \"sam\"\nrho = 0.1\n"],
    },
    Recipe {
        name: "cr-sam/cifar100/resnet18/cr-sam",
        source: CR_SAM_TABLES,
        settings: [CR_SAM_RESNET18, "optimizer = \"cr-sam\"\nrho = 0.15\nalpha = 0.5\nbeta = 0.01\n"],
    },
    Recipe {
        name: "sa-sam/authors-code",
        source: "the code of SA-SAM's authors (Naganuma et al. 2024), where it differs from their algorithm 1",
        settings: ["optimizer = \"sa-sam\"\ndelta = 0.02\n", "theta0 = 1.0\ndamping = 1.0\n"],
    },
];

impl Recipe {
    /// The recipe of this name.
    ///
    /// # Errors
    /// [`TrainError::Setting`] for a name that is not known; it has the most similar one.
    pub fn find(name: &str) -> Result<&'static Self, TrainError> {
        let unknown = || {
            let distance = |recipe: &&Self| strsim::levenshtein(recipe.name, name);
            let similar = RECIPES.iter().filter(|recipe| distance(recipe) <= 4).min_by_key(distance);
            let similar = similar.map_or(String::new(), |recipe| format!("; did you mean {}?", recipe.name));
            TrainError::setting("recipe", format!("{name}, expected one of `polder recipes`{similar}"))
        };
        RECIPES.iter().find(|recipe| recipe.name == name).ok_or_else(unknown)
    }

    /// Its options.
    ///
    /// # Errors
    /// None: a test reads every recipe.
    pub fn options(&self) -> Result<Options, TrainError> {
        Options::from_toml(&self.settings.concat()).map_err(|reason| TrainError::setting("recipe", reason))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_recipe_resolves_to_what_it_says() {
        for recipe in RECIPES {
            let options = recipe.options().unwrap();
            let settings = options.resolve().unwrap().to_toml().unwrap();
            for line in recipe.settings.concat().lines() {
                assert!(settings.lines().any(|other| other == line), "{}: {line} in {settings}", recipe.name);
            }
        }
        let error = Recipe::find("cr-sam/cifar10/resnet18/crsam").unwrap_err().to_string();
        assert!(error.ends_with("did you mean cr-sam/cifar10/resnet18/cr-sam?"), "{error}");
    }
}
