use pba
