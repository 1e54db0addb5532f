from tokcore.algorithms.songmass.prepare import longest_run, normalise_key, prepare_songs, quantise
from tokcore.algorithms.songmass.song import Note, Song, Word, read_songs, write_songs
