//! Pictures for papers: what they show and how they look.

use std::path::{Path, PathBuf};

use super::chart::SMALL;
use super::drawing::{Anchor, Drawing, Ink, Medium, Sheet};
use super::font::Font;
use super::landscape::{LoadedLandscape, landscape_drawings};
use super::runs::{landscape_folders, spectrum};
use super::spectrum::{spectrum_drawing, usable};
use super::text::{counted, shortened};
use super::{pdf, png};
use crate::settings::{Choice, Configurable};
use crate::train::{CurvatureFile, TrainError, hold, write_whole};
use crate::{settings, words};

words! {
    /// The kinds of files of pictures.
    pub enum PictureFormat {
        /// Vectors, for the web and for further editing
        Svg = "svg",
        /// Pixels
        Png = "png",
        /// Vectors, for LaTeX
        Pdf = "pdf",
    }
}

words! {
    /// The pictures of landscapes and spectra.
    pub enum PictureName {
        /// The loss over two directions, as contours
        Contour = "contour",
        /// The loss over two directions, as a surface
        Surface = "surface",
        /// The accuracy over two directions, as contours
        Accuracy = "accuracy",
        /// Loss and accuracy along a line
        Curve = "curve",
        /// The density of the Hessian's eigenvalues
        Spectrum = "spectrum",
    }
}

words! {
    /// The colours of contours and surfaces, from low to high.
    pub enum ColourMap {
        /// From dark blue over green to pale yellow
        BlueYellow = "blue-yellow",
        /// matplotlib's viridis
        Viridis = "viridis",
        /// matplotlib's cividis, made for readers with a colour deficiency
        Cividis = "cividis",
        /// matplotlib's magma
        Magma = "magma",
        /// matplotlib's plasma
        Plasma = "plasma",
        /// From blue over grey to red
        Coolwarm = "coolwarm",
        /// From nearly black to nearly white, for print without colours
        Grey = "grey",
    }
}

impl ColourMap {
    /// The colour at a place from 0 to 1.
    pub(super) fn at(self, share: f64) -> [u8; 3] {
        let stops = self.stops();
        let place = share.clamp(0.0, 1.0) * (stops.len() - 1) as f64;
        let index = (place as usize).min(stops.len() - 2);
        let (part, [low, high]) = (place - index as f64, [stops[index], stops[index + 1]]);
        std::array::from_fn(|c| (f64::from(low[c]) + part * (f64::from(high[c]) - f64::from(low[c]))).round() as u8)
    }

    /// Colours at equal distances.
    #[rustfmt::skip]
    fn stops(self) -> &'static [[u8; 3]] {
        match self {
            Self::BlueYellow => &[
                [22, 24, 72], [32, 72, 130], [30, 124, 142], [70, 172, 124], [170, 208, 96], [252, 236, 150],
            ],
            Self::Viridis => &[
                [68, 1, 84], [72, 36, 117], [65, 68, 135], [53, 95, 141], [42, 120, 142], [33, 145, 140],
                [34, 168, 132], [68, 191, 112], [122, 209, 81], [189, 223, 38], [253, 231, 37],
            ],
            Self::Cividis => &[
                [0, 34, 78], [8, 51, 112], [53, 69, 108], [79, 87, 108], [102, 105, 112], [125, 124, 120],
                [148, 142, 119], [174, 163, 113], [200, 184, 102], [229, 207, 82], [254, 232, 56],
            ],
            Self::Magma => &[
                [0, 0, 4], [20, 14, 54], [59, 15, 112], [100, 26, 128], [140, 41, 129], [183, 55, 121],
                [222, 73, 104], [247, 112, 92], [254, 159, 109], [254, 207, 146], [252, 253, 191],
            ],
            Self::Plasma => &[
                [13, 8, 135], [65, 4, 157], [106, 0, 168], [143, 13, 164], [177, 42, 144], [204, 71, 120],
                [225, 100, 98], [242, 132, 75], [252, 166, 54], [252, 206, 37], [240, 249, 33],
            ],
            Self::Coolwarm => &[
                [59, 76, 192], [89, 119, 227], [123, 159, 249], [158, 190, 255], [192, 212, 245], [221, 220, 220],
                [242, 203, 183], [247, 172, 142], [238, 132, 104], [214, 82, 68], [180, 4, 38],
            ],
            Self::Grey => &[[30, 30, 30], [245, 245, 245]],
        }
    }
}

settings! {
    /// How pictures look.
    #[derive(Debug, Clone, PartialEq)]
    pub struct PictureSettings {
        /// Which pictures, of those that the folder has
        draw: Vec<PictureName> = PictureName::ALL.to_vec();
        /// Kinds of files
        format: Vec<PictureFormat> = PictureFormat::ALL.to_vec();
        /// Width in millimetres
        width: Option<f64> = None, else "what suits the picture", as "MM", in positive;
        /// Height in millimetres
        height: Option<f64> = None, else "what suits the width", as "MM", in positive;
        /// Pixels per inch of a PNG
        dpi: f64 = 288.0, as "DPI", in positive;
        /// Draw on nothing instead of on white
        transparent: bool = false;
        /// The title; an empty one leaves it out
        title: Option<String> = None, else "run, model, data and what is drawn";
        /// The font: sans, serif, mono, or a file of a TrueType or OpenType font
        font: String = "sans".to_string(), as "FONT";
        /// Size of the labels in points; lines and margins grow with it
        font_size: f64 = 8.25, as "PT", in positive;
        /// The losses at the contour lines
        levels: Option<Vec<f64>> = None, else "round numbers", as "A,B,C";
        /// The most contour lines, where `levels` does not list them
        level_count: usize = 13, in between(2, 60);
        /// Colours of contours and surfaces
        colour_map: ColourMap = ColourMap::BlueYellow, as "MAP";
    }
}

/// The least side of the area within the axes, in units of a drawing.
const LEAST_SIDE: f64 = 60.0;
/// The most units and the most millimetres of a side of a picture.
const MOST_UNITS: f64 = 2e4;
const MOST_MILLIMETRES: f64 = 1e4;
/// The most pixels of a PNG.
const MOST_PIXELS: f64 = 1e8;
/// Size of a title and the distance of its lines.
const TITLE: (f64, f64) = (13.0, 17.0);
/// The most lines of a title.
const MOST_TITLE_LINES: usize = 4;

/// The size of a picture, and its title in lines.
pub(super) struct Frame {
    pub width: f64,
    pub height: f64,
    title: Vec<String>,
}

impl Frame {
    /// Where the picture begins below its title.
    pub fn top(&self) -> f64 {
        if self.title.is_empty() { 12.0 } else { 17.0 + TITLE.1 * self.title.len() as f64 }
    }

    /// An empty drawing of this size with the title.
    pub fn drawing(&self, description: &str) -> Drawing {
        let mut drawing = Drawing::new(self.width, self.height, description);
        for (index, line) in self.title.iter().enumerate() {
            let at = [0.5 * self.width, 18.0 + TITLE.1 * index as f64];
            drawing.label(at, line.as_str(), TITLE.0, Anchor::Middle, Ink::Text(1.0));
        }
        drawing
    }
}

/// Settings of pictures that have been checked.
pub(super) struct Look {
    pub sheet: Sheet,
    pub levels: Option<Vec<f64>>,
    pub level_count: usize,
    pub colours: ColourMap,
    /// Width and height in units of a drawing, where they were given.
    size: [Option<f64>; 2],
    title: Option<String>,
    formats: Vec<PictureFormat>,
    draw: Vec<PictureName>,
}

impl Look {
    /// # Errors
    /// A value out of its range; a font that cannot be read.
    pub fn new(settings: &PictureSettings) -> Result<Self, TrainError> {
        settings.check()?;
        let PictureSettings { draw, format, width, height, dpi, transparent, title, font, .. } = settings.clone();
        let PictureSettings { font_size, levels, level_count, colour_map, .. } = settings.clone();
        if let Some(levels) = &levels
            && (levels.is_empty()
                || levels.iter().any(|level| !level.is_finite())
                || levels.windows(2).any(|pair| pair[0] >= pair[1]))
        {
            let list = levels.iter().map(f64::to_string).collect::<Vec<_>>().join(",");
            return Err(TrainError::setting("levels", format!("{list}, expected finite numbers, each above the last")));
        }
        for (name, length) in [("width", width), ("height", height)] {
            if let Some(length) = length.filter(|&length| length > MOST_MILLIMETRES) {
                return Err(TrainError::setting(name, format!("{length}, expected at most {MOST_MILLIMETRES}")));
            }
        }
        // A point is 4/3 pixels of CSS. A drawing has labels of a fixed size, and everything else grows with them.
        let scale = font_size * 4.0 / 3.0 / SMALL;
        let units = |millimetres: Option<f64>| Some(millimetres? / Sheet::MILLIMETRES / scale);
        let sheet = Sheet { font: Font::find(&font)?, scale, dpi, transparent };
        let size = [units(width), units(height)];
        let title = title.map(|title| shortened(title.trim(), 1000));
        Ok(Self { sheet, levels, level_count, colours: colour_map, size, title, formats: format, draw })
    }

    /// The size of a picture with margins around an area that usually has this size, and its title.
    ///
    /// # Errors
    /// A width or a height with too little room for that area.
    pub fn frame(&self, area: [f64; 2], margins: [f64; 2], title: &[&str]) -> Result<Frame, TrainError> {
        let [given_width, given_height] = self.size;
        let frame = |width: f64| {
            let mut frame = Frame { width, height: 0.0, title: self.title_lines(title, width) };
            let usual = (width - margins[0]) * area[1] / area[0] + margins[1] + frame.top();
            frame.height = given_height.unwrap_or(usual);
            frame
        };
        let mut found = frame(given_width.unwrap_or(area[0] + margins[0]));
        if let (None, Some(height)) = (given_width, given_height) {
            // The proportions stay. A narrower picture may need another line for its title.
            for _ in 0..2 {
                let within = (height - margins[1] - found.top()).max(LEAST_SIDE);
                found = frame(within * area[0] / area[1] + margins[0]);
            }
        }
        let unit = self.sheet.scale * Sheet::MILLIMETRES;
        let size = format!("{:.0} mm by {:.0} mm", found.width * unit, found.height * unit);
        let narrow = found.width < margins[0] + LEAST_SIDE;
        if narrow || found.height < margins[1] + found.top() + LEAST_SIDE {
            // The width also decides the height, unless that is given.
            let is_width = given_width.is_some() && (narrow || given_height.is_none());
            let reason =
                format!("{size} leave too little room beside title and labels; enlarge it or reduce `font-size`");
            return Err(TrainError::setting(if is_width { "width" } else { "height" }, reason));
        }
        let longest = found.width.max(found.height);
        if longest > MOST_UNITS || longest * unit > MOST_MILLIMETRES {
            let reason =
                format!("with it a picture has {size}, which is too large, or its labels are too small to see");
            return Err(TrainError::setting("font-size", reason));
        }
        Ok(found)
    }

    /// The title in lines that fit the width.
    fn title_lines(&self, usual: &[&str], width: f64) -> Vec<String> {
        let paragraphs: Vec<&str> = match &self.title {
            Some(title) => vec![title],
            None => usual.to_vec(),
        };
        let mut lines = Vec::<String>::new();
        for paragraph in paragraphs {
            let mut line = String::new();
            for word in paragraph.split_whitespace() {
                let longer = if line.is_empty() { word.to_string() } else { format!("{line} {word}") };
                if !line.is_empty() && self.sheet.font.width(&longer, TITLE.0) > width - 16.0 {
                    lines.push(std::mem::replace(&mut line, word.into()));
                } else {
                    line = longer;
                }
            }
            lines.extend((!line.is_empty()).then_some(line));
        }
        if lines.len() > MOST_TITLE_LINES {
            lines.truncate(MOST_TITLE_LINES);
            lines[MOST_TITLE_LINES - 1].push('…');
        }
        lines
    }

    /// Whether a picture was asked for.
    pub fn draws(&self, name: PictureName) -> bool {
        self.draw.contains(&name)
    }

    /// Writes a drawing in each format and returns the paths.
    ///
    /// # Errors
    /// A PNG of too many pixels; a font that cannot be embedded; files that cannot be written.
    pub fn write(&self, drawing: &Drawing, folder: &Path, name: PictureName) -> Result<Vec<PathBuf>, TrainError> {
        let mut written = Vec::new();
        for format in &self.formats {
            let path = folder.join(format!("{name}.{format}"));
            let bytes = match format {
                PictureFormat::Svg => drawing.svg(Medium::Paper(&self.sheet)).into_bytes(),
                PictureFormat::Png => {
                    let [width, height] = png::size(drawing, &self.sheet);
                    if width * height > MOST_PIXELS || width.max(height) > 30_000.0 {
                        let reason = format!("{}, which makes a picture of {width}×{height} pixels", self.sheet.dpi);
                        return Err(TrainError::setting("dpi", format!("{reason}, expected fewer")));
                    }
                    png::png(drawing, &self.sheet).map_err(TrainError::io(&path))?
                }
                PictureFormat::Pdf => {
                    let font = |error: std::io::Error| TrainError::setting("font", error.to_string());
                    pdf::pdf(drawing, &self.sheet).map_err(font)?
                }
            };
            if !written.contains(&path) {
                write_whole(&path, &bytes)?;
                written.push(path);
            }
        }
        Ok(written)
    }
}

/// Draws the landscapes and the spectrum in a folder again, from `landscape.json` with `landscape.csv`, and from
/// `curvature.json`: those of the folder itself, or of its folders `landscape…` if it is that of a run. Each picture is
/// written beside the files that it is drawn from, or to `out`. Returns the files written.
///
/// # Errors
/// A folder that is not there or has nothing to draw; several landscapes for one `out`; files that cannot be read or
/// written; settings that cannot be used.
pub fn pictures(folder: &Path, out: Option<&Path>, settings: &PictureSettings) -> Result<Vec<PathBuf>, TrainError> {
    let look = Look::new(settings)?;
    std::fs::metadata(folder).map_err(TrainError::io(folder))?;
    let own = folder.join("landscape.json").exists();
    let landscapes: Vec<PathBuf> = match own {
        true => vec![folder.into()],
        false => landscape_folders(folder)?.into_iter().map(|(_, folder)| folder).collect(),
    };
    let file = CurvatureFile::read(&folder.join("curvature.json"))?;
    let found = file.as_ref().and_then(|file| Some((file, spectrum(file.measures.as_ref()?)?)));
    let density = found.and_then(|(file, found)| Some((file, usable(&found.nodes, &found.weights)?.0)));
    if landscapes.is_empty() && density.is_none() {
        let reason = "has no landscape (landscape.json) and no spectrum (curvature.json) to draw".into();
        return Err(TrainError::Results { path: folder.into(), reason });
    }
    if out.is_some() && landscapes.len() > 1 {
        let reason =
            format!("{} has {}; give the folder of one", folder.display(), counted(landscapes.len(), "landscape"));
        return Err(TrainError::setting("out", reason));
    }
    let mut written = Vec::new();
    for place in &landscapes {
        let drawings = landscape_drawings(&LoadedLandscape::read(place)?, &look)?;
        written.extend(write_all(&look, drawings, out.unwrap_or(place))?);
    }
    if let Some((file, density)) = density.filter(|_| look.draws(PictureName::Spectrum)) {
        let drawing = spectrum_drawing(density, &file.subject, &look)?;
        let drawings = drawing.map(|drawing| (PictureName::Spectrum, drawing)).into_iter().collect();
        written.extend(write_all(&look, drawings, out.unwrap_or(folder))?);
    }
    if written.is_empty() {
        let path = folder.into();
        return Err(TrainError::Results { path, reason: "has none of the pictures, or no finite loss".into() });
    }
    Ok(written)
}

/// Writes drawings to a folder that no other command writes to meanwhile.
fn write_all(look: &Look, drawings: Vec<(PictureName, Drawing)>, folder: &Path) -> Result<Vec<PathBuf>, TrainError> {
    if drawings.is_empty() {
        return Ok(Vec::new());
    }
    let held = hold(folder)?;
    let mut written = Vec::new();
    for (name, drawing) in drawings {
        held.check()?;
        written.extend(look.write(&drawing, folder, name)?);
    }
    Ok(written)
}
