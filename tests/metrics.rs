//! The epoch's sums against the same sums written down here.

mod common;

use common::devices;
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
