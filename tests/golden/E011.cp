policy café
