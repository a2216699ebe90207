//! The epoch's sums and the means of losses against the same computation on the host.

use crate::common::devices;
use polder::kernels::metrics;

#[test]
fn steps_add_up_and_skipped_ones_do_not_count() {
    for (name, device) in devices() {
        let mut totals = device.zeros::<f64>(3).unwrap();
        let steps = [(0.5, 3, 0, 8), (f64::NAN, 2, 1, 8), (1.25, 5, 0, 6), (2.0, 7, u32::MAX, 6)];
        for (loss, correct, skip, samples) in steps {
            let loss = device.upload(&[loss]).unwrap();
            let (correct, skip) = (device.upload(&[correct]).unwrap(), device.upload(&[skip]).unwrap());
            metrics::record(loss.view(), correct.view(), skip.view(), samples, totals.view_mut()).unwrap();
        }
        assert_eq!(totals.to_vec().unwrap(), [0.5 * 8.0 + 1.25 * 6.0, 8.0, 14.0], "{name}");
        let (one, two) = (device.zeros::<f64>(1).unwrap(), device.zeros::<u32>(2).unwrap());
        let skip = device.zeros::<u32>(1).unwrap();
        let error = metrics::record(one.view(), two.view(), skip.view(), 1, totals.view_mut()).unwrap_err();
        assert!(error.to_string().contains("`correct` has 2 elements, expected 1"), "{error}");
    }
}

#[test]
fn terms_make_their_mean() {
    for (name, device) in devices() {
        let mut mean = device.poisoned::<f64>(1).unwrap();
        for (term, add) in [(3.0, false), (5.0, true), (-1.0, true)] {
            let term = device.upload(&[term]).unwrap();
            metrics::mean_term(term.view(), 0.25, add, mean.view_mut()).unwrap();
        }
        assert_eq!(mean.to_vec().unwrap(), [1.75], "{name}");
        let two = device.zeros::<f64>(2).unwrap();
        let error = metrics::mean_term(two.view(), 1.0, false, mean.view_mut()).unwrap_err();
        assert!(error.to_string().contains("`term` has 2 elements, expected 1"), "{error}");
    }
}
