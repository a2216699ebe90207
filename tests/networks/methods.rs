//! Five steps of the sharpness-aware methods beyond SAM and CR-SAM against float64 PyTorch;
//! `tests/networks/training.rs` has those and the base optimizers, `tests/fixtures/README.md` says where the references
//! come from.

use polder::device::Device;

use crate::common::fixtures::{check_run, check_runs};

#[test]
fn sam_with_other_perturbations_matches_pytorch() {
    check_runs(&["asam", "sam-on", "sam-3-steps", "sam-second-order", "sam-clip"]);
}

#[test]
fn gradient_norm_regularisation_matches_pytorch() {
    check_runs(&["gnr", "gnr-sam-every-2", "gnr-difference", "gnr-adamw", "gam"]);
}

#[test]
fn methods_with_a_memory_match_pytorch() {
    check_runs(&["sa-sam", "sa-sgd", "looksam", "friendly-sam"]);
}

#[test]
fn random_perturbations_match_pytorch() {
    check_runs(&["random-sam", "r-sam", "cr-sam-random"]);
}

#[test]
fn momentum_sam_matches_pytorch_over_either_base() {
    check_runs(&["msam", "msam-adamw"]);
}

#[test]
fn weighted_sharpness_beside_either_base_matches_pytorch() {
    check_runs(&["wsam", "wsam-adamw"]);
}

#[test]
fn sassha_matches_pytorch() {
    // Few probes leave some curvatures near zero, whose roots single precision does not have.
    check_run::<f64>(&Device::host(), "sassha", 1e-6);
}

#[test]
fn muon_alone_and_as_a_base_matches_pytorch() {
    check_runs(&["muon", "muon-sam"]);
}

#[test]
fn groups_of_the_batch_match_pytorch() {
    check_runs(&["sam-in-groups"]);
}

#[test]
fn gsam_matches_pytorch() {
    check_runs(&["gsam", "gsam-adamw"]);
}
