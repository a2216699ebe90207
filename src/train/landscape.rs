//! Loss and accuracy on a grid around the weights. The folder of a landscape holds all that is needed to continue it:
//! `landscape.json`, its description; `direction-1.safetensors` …; `landscape.csv`, a line for each point that was
//! evaluated.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::files::{MOST_LINES, if_there, read_text};
use super::{Evaluator, TrainError, weights, write_whole};
use crate::arena::Layout;
use crate::device::{Buffer, Error, Slice};
use crate::kernels::vector;

/// An axis of the grid.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Axis {
    /// The name of its direction.
    pub name: String,
    /// Coordinates, in units of the direction.
    pub values: Vec<f64>,
}

/// The description of a landscape: `landscape.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Landscape {
    /// The title of its pictures.
    pub title: String,
    /// Run, model and data, for the title too. Empty where they are not known.
    #[serde(default)]
    pub subject: String,
    /// One or two.
    pub axes: Vec<Axis>,
    /// Everything that its values depend on, by the names of the options. A landscape can only be continued with the
    /// same settings. Empty where another program has written the file, for a picture.
    #[serde(default)]
    pub settings: BTreeMap<String, String>,
}

impl Landscape {
    /// The most points of a landscape; its pictures could not show more.
    pub const MOST_POINTS: usize = 4_000_000;

    /// Reads the description of the landscape in a folder.
    ///
    /// # Errors
    /// A file that is missing or damaged.
    pub fn read(folder: &Path) -> Result<Self, TrainError> {
        let path = folder.join("landscape.json");
        let text = read_text(&path, MOST_LINES)?;
        serde_json::from_str(&text).map_err(|error| TrainError::Results { path, reason: error.to_string() })
    }

    /// The landscape that the folder holds, which must have these settings.
    ///
    /// # Errors
    /// The first setting that differs; those of [`Landscape::read`].
    pub fn begun(folder: &Path, settings: &BTreeMap<String, String>) -> Result<Option<Self>, TrainError> {
        if !folder.join("landscape.json").exists() {
            let points = folder.join("landscape.csv");
            if points.exists() {
                let reason = "points of an unknown landscape (there is no landscape.json)".into();
                return Err(TrainError::Occupied { path: points, reason });
            }
            return Ok(None);
        }
        let found = Self::read(folder)?;
        let said = |key: &str| found.settings.get(key).and_then(|text| text.parse::<usize>().ok());
        let agrees = |key: &str, count: usize| said(key).is_none_or(|said| said == count);
        let whole = |axis: &Axis| agrees("points", axis.values.len()) && axis.values.iter().all(|x| x.is_finite());
        if !agrees("dimensions", found.axes.len()) || !found.axes.iter().all(whole) {
            let reason = "its axes contradict its `dimensions` or `points`".into();
            return Err(TrainError::Results { path: folder.join("landscape.json"), reason });
        }
        let (theirs, mine) = (&found.settings, settings);
        // Samples are compared first, because they limit the size of a batch.
        let mut keys =
            mine.get_key_value("samples").map(|(key, _)| key).into_iter().chain(mine.keys()).chain(theirs.keys());
        let differs = keys.find(|key| mine.get(*key) != theirs.get(*key));
        if let Some(key) = differs {
            let value = |of: &BTreeMap<String, String>| of.get(key).map_or("not given".into(), |value| value.clone());
            let reason = format!("holds a landscape whose {key} is {}, not {}", value(theirs), value(mine));
            return Err(TrainError::Occupied { path: folder.into(), reason });
        }
        Ok(Some(found))
    }

    /// Writes the description to its folder.
    ///
    /// # Errors
    /// Those of the file.
    pub fn write(&self, folder: &Path) -> Result<(), TrainError> {
        let path = folder.join("landscape.json");
        let text = serde_json::to_string_pretty(self).map_err(|error| TrainError::io(&path)(error.into()))?;
        write_whole(&path, text.as_bytes())
    }

    /// The number of points.
    pub fn len(&self) -> usize {
        self.axes.iter().map(|axis| axis.values.len()).product()
    }

    /// Whether there are no points.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The coordinates of a point. The first axis varies fastest.
    pub fn place(&self, mut point: usize) -> Vec<f64> {
        let mut place = Vec::new();
        for Axis { values, .. } in &self.axes {
            place.push(values[point % values.len()]);
            point /= values.len();
        }
        place
    }
}

/// The path of the direction of an axis.
fn direction_path(folder: &Path, axis: usize) -> PathBuf {
    folder.join(format!("direction-{}.safetensors", axis + 1))
}

/// Saves a direction, under the names of the parameters.
///
/// # Errors
/// Those of the file.
pub fn save_direction(folder: &Path, axis: usize, layout: &Layout, direction: &[f32]) -> Result<(), TrainError> {
    weights::save(&direction_path(folder, axis), &[(layout, direction)])
}

/// Loads the direction of an axis.
///
/// # Errors
/// A file that is missing, damaged, or of another model.
pub fn load_direction(folder: &Path, axis: usize, layout: &Layout) -> Result<Vec<f32>, TrainError> {
    let [direction, _] = weights::load(&direction_path(folder, axis), [layout, &Layout::default()])?;
    Ok(direction)
}

/// Loss and accuracy at a point.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Height {
    /// Mean cross-entropy; may be infinite or NaN.
    pub loss: f64,
    /// Fraction of correctly classified images.
    pub accuracy: f64,
}

/// The evaluated points, in `landscape.csv`.
pub struct Heights {
    path: PathBuf,
    file: File,
    list: Vec<Height>,
}

impl Heights {
    /// Opens the points of a landscape. Evaluated points stay; an incomplete last line is dropped.
    ///
    /// # Errors
    /// The file; lines of another grid.
    pub fn open(folder: &Path, landscape: &Landscape) -> Result<Self, TrainError> {
        let path = folder.join("landscape.csv");
        let text = if_there(read_text(&path, MOST_LINES))?.unwrap_or_default();
        let header = if landscape.axes.len() == 1 { "x,loss,accuracy" } else { "x,y,loss,accuracy" };
        // A line without its end was cut off.
        let whole = text.rfind('\n').map_or("", |end| &text[..=end]);
        let mut list = Vec::new();
        for (number, line) in whole.lines().enumerate() {
            let read = || {
                let numbers: Vec<f64> = line.split(',').map(|cell| cell.parse().ok()).collect::<Option<_>>()?;
                let (place, height) = numbers.split_at_checked(landscape.axes.len())?;
                let &[loss, accuracy] = height else { return None };
                let known = number <= landscape.len() && place == landscape.place(number - 1);
                known.then_some(Height { loss, accuracy })
            };
            match number {
                0 if line == header => {}
                0 => return Err(damaged(&path, 1)),
                _ => list.push(read().ok_or_else(|| damaged(&path, number + 1))?),
            }
        }
        let file = OpenOptions::new().create(true).write(true).truncate(false).open(&path);
        let mut file = file.map_err(TrainError::io(&path))?;
        let begun = !whole.is_empty();
        let mut start = || {
            file.set_len(whole.len() as u64)?;
            std::io::Seek::seek(&mut file, std::io::SeekFrom::End(0))?;
            if begun { Ok(()) } else { writeln!(file, "{header}") }
        };
        start().map_err(TrainError::io(&path))?;
        Ok(Self { path, file, list })
    }

    /// The points evaluated so far.
    pub fn list(&self) -> &[Height] {
        &self.list
    }

    fn push(&mut self, place: &[f64], height: Height) -> Result<(), TrainError> {
        let line: String = place.iter().map(|coordinate| format!("{coordinate},")).collect();
        let line = format!("{line}{},{}\n", height.loss, height.accuracy);
        self.file.write_all(line.as_bytes()).map_err(TrainError::io(&self.path))?;
        self.list.push(height);
        Ok(())
    }

    /// Evaluates the missing points, at `weights` moved along the directions with unchanged running statistics. Each is
    /// saved at once. `go_on` receives the number of points done; it stops the work by returning false, also within a
    /// point, which is then left out.
    ///
    /// # Errors
    /// Those of the device and of the file.
    pub fn complete(
        &mut self,
        landscape: &Landscape,
        evaluator: &mut Evaluator,
        (weights, statistics): (Slice<'_, f32>, Slice<'_, f32>),
        directions: &[Buffer<f32>],
        mut go_on: impl FnMut(usize) -> bool,
    ) -> Result<(), TrainError> {
        let mut moved = weights.device().zeros(weights.len())?;
        while self.list.len() < landscape.len() && go_on(self.list.len()) {
            let place = landscape.place(self.list.len());
            moved.view_mut().copy_from(weights)?;
            for (&along, direction) in place.iter().zip(directions) {
                vector::axpy(along, direction.view(), moved.view_mut())?;
            }
            let done = self.list.len();
            let found = evaluator.evaluate(moved.view(), statistics, |_| {
                if go_on(done) { Ok(()) } else { Err(TrainError::Device(Error::Stopped)) }
            });
            let Some(found) = TrainError::unless_stopped(found)? else { break };
            self.push(&place, Height { loss: found.loss, accuracy: found.accuracy })?;
        }
        Ok(())
    }
}

fn damaged(path: &Path, line: usize) -> TrainError {
    TrainError::Results { path: path.into(), reason: format!("line {line} is not a point of this landscape") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn landscape() -> Landscape {
        let axis = |name: &str, values: &[f64]| Axis { name: name.into(), values: values.into() };
        let axes = vec![axis("a", &[-1.0, 0.1, 1.0]), axis("b", &[-2.0, 2.0])];
        Landscape {
            title: "a plane".into(),
            subject: String::new(),
            axes,
            settings: BTreeMap::from([("seed".into(), "7".into())]),
        }
    }

    #[test]
    fn a_landscape_that_was_cut_off_goes_on_where_its_last_whole_line_ends() {
        let folder = tempfile::tempdir().unwrap();
        let landscape = landscape();
        let height = |point: usize| Height { loss: 0.1 + point as f64 / 3.0, accuracy: 0.5 };
        let mut heights = Heights::open(folder.path(), &landscape).unwrap();
        for point in 0..4 {
            heights.push(&landscape.place(point), height(point)).unwrap();
        }
        heights.push(&landscape.place(4), Height { loss: f64::NAN, accuracy: 0.0 }).unwrap();
        let path = folder.path().join("landscape.csv");
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("x,y,loss,accuracy\n-1,-2,0.1,0.5\n0.1,-2,"), "{text}");
        let heights = Heights::open(folder.path(), &landscape).unwrap();
        assert_eq!(heights.list()[..4], [0, 1, 2, 3].map(height));
        assert!(heights.list()[4].loss.is_nan());
        std::fs::write(&path, &text[..text.len() - 3]).unwrap();
        let mut heights = Heights::open(folder.path(), &landscape).unwrap();
        assert_eq!(heights.list(), [0, 1, 2, 3].map(height));
        heights.push(&landscape.place(4), height(4)).unwrap();
        assert_eq!(Heights::open(folder.path(), &landscape).unwrap().list().len(), 5);
        // A line of another grid, a line that is not a point, and a line too many.
        for (wrong, line) in [("0.2,-2,1,1", 3), ("0.1,-2,1", 3), ("0.1,-2,x,1", 3)] {
            std::fs::write(&path, format!("x,y,loss,accuracy\n-1,-2,0.1,0.5\n{wrong}\n")).unwrap();
            let error = Heights::open(folder.path(), &landscape).err().unwrap().to_string();
            assert!(error.contains("landscape.csv") && error.contains(&format!("line {line}")), "{error}");
        }
        std::fs::write(&path, "x,loss,accuracy\n").unwrap();
        assert!(Heights::open(folder.path(), &landscape).err().unwrap().to_string().contains("line 1"));
    }

    #[test]
    fn a_landscape_goes_on_only_as_it_began() {
        let folder = tempfile::tempdir().unwrap();
        let landscape = landscape();
        assert_eq!(Landscape::begun(folder.path(), &landscape.settings).unwrap(), None);
        let points = folder.path().join("landscape.csv");
        std::fs::write(&points, "x,y,loss,accuracy\n").unwrap();
        let error = Landscape::begun(folder.path(), &landscape.settings).unwrap_err().to_string();
        assert!(error.contains("landscape.csv: points of an unknown landscape"), "{error}");
        std::fs::remove_file(&points).unwrap();
        landscape.write(folder.path()).unwrap();
        assert_eq!(Landscape::begun(folder.path(), &landscape.settings).unwrap(), Some(landscape));
        let other = BTreeMap::from([("seed".into(), "8".into())]);
        let error = Landscape::begun(folder.path(), &other).unwrap_err().to_string();
        assert!(error.contains("seed is 7, not 8"), "{error}");
        // A description that contradicts itself is refused before anything is computed.
        for (key, value) in [("dimensions", "3"), ("points", "3")] {
            let mut landscape = self::landscape();
            landscape.settings.insert(key.into(), value.into());
            landscape.write(folder.path()).unwrap();
            let error = Landscape::begun(folder.path(), &landscape.settings).unwrap_err().to_string();
            assert!(error.contains("landscape.json: its axes contradict"), "{key}: {error}");
        }
    }

    #[test]
    fn places_go_along_the_first_axis_first() {
        let landscape = landscape();
        let places: Vec<Vec<f64>> = (0..landscape.len()).map(|point| landscape.place(point)).collect();
        assert_eq!(places, [[-1.0, -2.0], [0.1, -2.0], [1.0, -2.0], [-1.0, 2.0], [0.1, 2.0], [1.0, 2.0]]);
    }
}
