//! Settings of published experiments, by name.

use super::{Options, TrainError};

/// The settings of a published experiment: a layer of [`Options`], any of which can be replaced. The place of the data
/// set is not among them.
#[derive(Debug, Clone)]
pub struct Recipe {
    /// Paper, data set, model and method, such as `cr-sam/cifar10/resnet18/sam`.
    pub name: String,
    /// Where the values stand.
    pub source: &'static str,
    /// TOML.
    settings: String,
}

/// 200 epochs in batches of 128.
const COMMON: &str = "epochs = 200\nbatch-size = 128\nmomentum = 0.9\nschedule = \"cosine\"\naugment = \"basic\"\n";

/// Data set, model, weight decay, SAM's ρ, and CR-SAM's ρ, α and β.
const CR_SAM: [(&str, &str, f64, f64, [f64; 3]); 8] = [
    ("cifar10", "resnet18", 5e-3, 0.05, [0.1, 0.1, 0.01]),
    ("cifar10", "resnet101", 5e-3, 0.05, [0.1, 0.2, 0.05]),
    ("cifar10", "wrn-28-10", 1e-3, 0.1, [0.1, 0.5, 0.1]),
    ("cifar10", "pyramidnet-110", 5e-4, 0.15, [0.2, 0.5, 0.1]),
    ("cifar100", "resnet18", 5e-3, 0.1, [0.15, 0.5, 0.01]),
    ("cifar100", "resnet101", 5e-3, 0.1, [0.15, 0.5, 0.05]),
    ("cifar100", "wrn-28-10", 1e-3, 0.1, [0.15, 0.5, 0.1]),
    ("cifar100", "pyramidnet-110", 5e-4, 0.15, [0.2, 0.5, 0.1]),
];

/// Data set, model, and GAM's r′, β0, β1 and γ.
const GAM: [(&str, &str, [f64; 4]); 6] = [
    ("cifar10", "resnet18", [0.03, 0.1, 0.1, 0.05]),
    ("cifar10", "resnet101", [0.03, 0.1, 0.1, 0.05]),
    ("cifar10", "pyramidnet-110-bottleneck", [0.03, 0.1, 0.1, 0.03]),
    ("cifar100", "resnet18", [0.02, 0.5, 0.6, 0.03]),
    ("cifar100", "resnet101", [0.02, 0.5, 0.6, 0.03]),
    ("cifar100", "pyramidnet-110-bottleneck", [0.04, 0.3, 0.5, 0.05]),
];

/// By GAM's data set: the normalisation, and the label smoothing. The authors' smoothing of 0.1 goes to the other
/// classes alone: with C classes that is `0.1 C/(C − 1)` here.
const GAM_DATA: [(&str, &str); 2] = [
    (
        "cifar10",
        "mean = [0.49139968, 0.48215827, 0.44653124]\nstd = [0.2023, 0.1994, 0.201]\n\
        label-smoothing = 0.1111111111111111\n",
    ),
    (
        "cifar100",
        "mean = [0.5071, 0.4867, 0.4408]\nstd = [0.2675, 0.2565, 0.2761]\n\
        label-smoothing = 0.10101010101010101\n",
    ),
];

fn cr_sam() -> impl Iterator<Item = Recipe> {
    CR_SAM.into_iter().flat_map(|(data, model, decay, sam_rho, [rho, alpha, beta])| {
        let recipe = |method: &str, own: String| Recipe {
            name: format!("cr-sam/{data}/{model}/{method}"),
            source: "CR-SAM (Wu, Luo, Wunsch 2024), tables 4 and 5",
            settings: format!(
                "model = \"{model}\"\n{COMMON}lr = 0.05\nweight-decay = {decay}\noptimizer = \"{method}\"\n{own}"
            ),
        };
        [
            recipe("sam", format!("rho = {sam_rho}\n")),
            recipe("cr-sam", format!("rho = {rho}\nalpha = {alpha}\nbeta = {beta}\n")),
        ]
    })
}

fn gam() -> impl Iterator<Item = Recipe> {
    GAM.into_iter().map(|(data, model, [rho, beta0, beta1, gamma])| {
        let of_data: String =
            GAM_DATA.iter().filter(|(name, _)| *name == data).map(|(_, settings)| *settings).collect();
        let own = format!("rho = {rho}\nrho-norm = 0.2\nbeta0 = {beta0}\nbeta1 = {beta1}\ngamma = {gamma}\n");
        Recipe {
            name: format!("gam/{data}/{model}/gam"),
            source: "the code of GAM's authors (Zhang et al. 2023), main_cifar.py",
            settings: format!(
                "model = \"{model}\"\n{COMMON}lr = 0.1\nweight-decay = 5e-4\n{of_data}optimizer = \"gam\"\n{own}"
            ),
        }
    })
}

fn others() -> [Recipe; 2] {
    [
        Recipe {
            name: "sam/cifar10/wrn-28-10/sam".into(),
            source: "the code of SAM's authors (Foret et al. 2021): the table of hyper-parameters, its default flags, and \
                the rho of its README",
            settings: "model = \"wrn-28-10\"\nepochs = 200\nbatch-size = 256\nlr = 0.1\nmomentum = 0.9\n\
                nesterov = true\nweight-decay = 5e-4\nclip = 5.0\nschedule = \"cosine\"\naugment = \"basic\"\n\
                optimizer = \"sam\"\nrho = 0.05\n"
                .into(),
        },
        Recipe {
            name: "sa-sam/authors-code".into(),
            source: "the code of SA-SAM's authors (Naganuma et al. 2024), where it differs from their algorithm 1",
            settings: "optimizer = \"sa-sam\"\ndelta = 0.02\ntheta0 = 1.0\ndamping = 1.0\n".into(),
        },
    ]
}

impl Recipe {
    /// All recipes.
    pub fn all() -> Vec<Self> {
        cr_sam().chain(gam()).chain(others()).collect()
    }

    /// The recipe of this name.
    ///
    /// # Errors
    /// [`TrainError::Setting`] for a name that is not known; it has the most similar one.
    pub fn find(name: &str) -> Result<Self, TrainError> {
        let all = Self::all();
        let unknown = || {
            let distance = |recipe: &&Self| strsim::levenshtein(&recipe.name, name);
            let similar = all.iter().filter(|recipe| distance(recipe) <= 4).min_by_key(distance);
            let similar = similar.map_or(String::new(), |recipe| format!("; did you mean {}?", recipe.name));
            TrainError::setting("recipe", format!("{name}, expected one of `polder recipes`{similar}"))
        };
        all.iter().find(|recipe| recipe.name == name).cloned().ok_or_else(unknown)
    }

    /// Its options.
    ///
    /// # Errors
    /// None: a test reads every recipe.
    pub fn options(&self) -> Result<Options, TrainError> {
        Options::from_toml(&self.settings).map_err(|reason| TrainError::setting("recipe", reason))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_recipe_resolves_to_what_it_says() {
        let all = Recipe::all();
        for (index, recipe) in all.iter().enumerate() {
            assert!(
                all[..index].iter().all(|other| other.name != recipe.name),
                "two recipes are named {}",
                recipe.name
            );
            let resolved = recipe.options().unwrap().resolve().unwrap().to_toml().unwrap();
            let [said, resolved]: [toml::Table; 2] =
                [&recipe.settings, &resolved].map(|text| toml::from_str(text).unwrap());
            for (name, value) in &said {
                assert_eq!(resolved.get(name), Some(value), "{}: {name}", recipe.name);
            }
            // The name says the model and the method.
            let parts: Vec<&str> = recipe.name.split('/').collect();
            if let [_, _, model, method] = parts[..] {
                assert_eq!((said["model"].as_str(), said["optimizer"].as_str()), (Some(model), Some(method)));
            }
        }
    }

    #[test]
    fn recipes_have_the_values_of_their_sources() {
        let value = |name: &str, option: &str| -> String {
            let options = Recipe::find(name).unwrap().options().unwrap();
            options.iter().find(|(name, _)| *name == option).unwrap().1.to_string()
        };
        assert_eq!(Recipe::all().iter().filter(|recipe| recipe.name.starts_with("cr-sam/")).count(), 16);
        let values =
            |name: &str, options: &[&str]| options.iter().map(|option| value(name, option)).collect::<Vec<_>>();
        let cr_sam = ["rho", "alpha", "beta", "weight-decay", "lr"];
        assert_eq!(values("cr-sam/cifar10/resnet101/cr-sam", &cr_sam), ["0.1", "0.2", "0.05", "0.005", "0.05"]);
        assert_eq!(values("cr-sam/cifar100/wrn-28-10/cr-sam", &cr_sam), ["0.15", "0.5", "0.1", "0.001", "0.05"]);
        assert_eq!(values("cr-sam/cifar100/pyramidnet-110/sam", &["rho", "weight-decay"]), ["0.15", "5e-4"]);
        let gam = ["rho", "rho-norm", "beta0", "beta1", "gamma", "lr", "weight-decay"];
        let expected = ["0.04", "0.2", "0.3", "0.5", "0.05", "0.1", "5e-4"];
        assert_eq!(values("gam/cifar100/pyramidnet-110-bottleneck/gam", &gam), expected);
        // What the authors' smoothing leaves to the label: 1 − s + s/C.
        for (data, classes) in [("cifar10", 10.0), ("cifar100", 100.0)] {
            let smoothing: f64 = value(&format!("gam/{data}/resnet18/gam"), "label-smoothing").parse().unwrap();
            assert!((1.0 - smoothing + smoothing / classes - 0.9).abs() < 1e-15, "{data}: {smoothing}");
        }
        let sam = ["rho", "lr", "batch-size", "clip", "nesterov", "weight-decay"];
        let expected = ["0.05", "0.1", "256", "5", "true", "5e-4"];
        assert_eq!(values("sam/cifar10/wrn-28-10/sam", &sam), expected);
    }

    #[test]
    fn an_unknown_recipe_is_told_with_the_most_similar_one() {
        let error = Recipe::find("cr-sam/cifar10/resnet18/crsam").unwrap_err().to_string();
        assert!(error.ends_with("did you mean cr-sam/cifar10/resnet18/cr-sam?"), "{error}");
    }
}
